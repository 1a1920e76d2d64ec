//! NCCL's result codes, data types and calls.

/// An `ncclResult_t` other than success.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Code(pub i32);

#[allow(missing_docs, reason = "NCCL's names")]
impl Code {
    pub const UNHANDLED_CUDA_ERROR: Code = Code(1);
    pub const SYSTEM_ERROR: Code = Code(2);
    pub const INTERNAL_ERROR: Code = Code(3);
    pub const INVALID_ARGUMENT: Code = Code(4);
    pub const INVALID_USAGE: Code = Code(5);
    pub const REMOTE_ERROR: Code = Code(6);
    pub const IN_PROGRESS: Code = Code(7);
}

/// What a call answers.
pub type Result<T> = std::result::Result<T, Code>;

/// An `ncclDataType_t` that exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataType(i32);

impl DataType {
    /// From NCCL's number.
    pub fn new(number: i32) -> Option<Self> {
        (0..12).contains(&number).then_some(Self(number))
    }

    /// NCCL's number.
    pub fn number(self) -> i32 {
        self.0
    }

    /// Bytes of an element.
    pub fn n_bytes(self) -> usize {
        [1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1][self.0 as usize]
    }
}

/// A reduction, with the scalar of those that have one.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RedOp {
    /// ncclSum.
    Sum,
    /// ncclProd.
    Prod,
    /// ncclMax.
    Max,
    /// ncclMin.
    Min,
    /// ncclAvg.
    Avg,
    /// Each input times a scalar, then the sum; the scalar's bytes, or the device address where they are.
    PreMulSum(Scalar),
}

/// Where a scalar is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Scalar {
    /// Its bytes.
    Here([u8; 8]),
    /// Its address in device memory, read when the operation runs.
    Device(usize),
}

/// Which collective.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "NCCL's names")]
pub enum Kind {
    AllReduce,
    AllGather,
    ReduceScatter,
    Broadcast,
    Reduce,
    AlltoAll,
}

/// One call.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// A collective.
    Collective(Collective),
    /// ncclSend.
    Send {
        /// Address.
        from: usize,
        /// Bytes.
        n_bytes: usize,
        /// Receiver.
        peer: usize,
    },
    /// ncclRecv.
    Recv {
        /// Address.
        to: usize,
        /// Bytes.
        n_bytes: usize,
        /// Sender.
        peer: usize,
    },
}

/// A collective as one rank calls it.
#[derive(Clone, Copy, Debug)]
pub struct Collective {
    /// Which.
    pub kind: Kind,
    /// Address.
    pub send: usize,
    /// Address.
    pub recv: usize,
    /// Elements, in NCCL's sense of the collective.
    pub count: usize,
    /// Their type.
    pub datatype: DataType,
    /// The reduction, of those that have one.
    pub op: RedOp,
    /// The root, of those that have one.
    pub root: usize,
}
