//! Pure: does this all-reduce go to the real NCCL as it is, or is it ours, exact or compressed?
//!
//! Decided from rank-invariant facts alone: element type, operation, count, the communicator's verdict. Never from whether it is in place, from alignment, allocator, group nesting or anything else that may differ
//! between ranks: a rank that decides otherwise hangs the job. In doubt, forward.

use std::ffi::CStr;

use crate::config::Config;
use crate::element::ElementType;
use crate::nccl::{DataType, RedOp};
use crate::verdict::{Carrier, Verdict, Way};

/// What one call asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    /// Elements.
    pub count: usize,
    /// Their type.
    pub datatype: DataType,
    /// The reduction.
    pub op: RedOp,
}

impl Request {
    /// Bytes of the input; 0 for a type that this version does not know.
    pub(crate) fn n_bytes(&self) -> u64 {
        (self.count as u64).saturating_mul(self.datatype.n_bytes())
    }
}

/// Where an all-reduce goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Route {
    /// To the real NCCL, unchanged.
    Forward(Reason),
    /// Uncompressed, in one hop or in two.
    Exact { two_hops: bool },
    /// Through the two hops.
    Compress(Carrier),
}

/// Why a call is forwarded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// `FLASHCOMM_ENABLE=0`.
    Disabled,
    /// Not fp16 or bf16, or excluded by `FLASHCOMM_DTYPES`.
    DataType,
    /// Neither `ncclSum` nor `ncclAvg`.
    Operation,
    /// No elements; the real NCCL answers.
    Empty,
    /// Below the threshold, and above that of exact sums.
    Small,
    /// The communicator is off.
    CommunicatorOff,
    /// The ranks of the communicator have not met: it was not created through the shim, or does not block and is still in
    /// the making.
    Unattached,
    /// An explicit collective configuration, which only the real NCCL can serve.
    Configuration,
    /// No communicator was given; the real NCCL answers.
    NoCommunicator,
    /// The engine has switched the communicator off.
    SwitchedOff,
    /// The communicator is on, but by default compresses nothing: the real NCCL is faster, or sends less.
    NotFaster,
}

impl Reason {
    /// Every reason, in the order of their counters.
    pub const ALL: [Reason; 11] = [
        Reason::Disabled,
        Reason::DataType,
        Reason::Operation,
        Reason::Empty,
        Reason::Small,
        Reason::CommunicatorOff,
        Reason::Unattached,
        Reason::Configuration,
        Reason::NoCommunicator,
        Reason::SwitchedOff,
        Reason::NotFaster,
    ];

    /// As in the statistics.
    pub const fn name(self) -> &'static str {
        match self.c_name().to_str() {
            Ok(name) => name,
            Err(_) => unreachable!(),
        }
    }

    /// The same for C.
    pub const fn c_name(self) -> &'static CStr {
        match self {
            Reason::Disabled => c"disabled",
            Reason::DataType => c"datatype",
            Reason::Operation => c"operation",
            Reason::Empty => c"empty",
            Reason::Small => c"small",
            Reason::CommunicatorOff => c"communicator_off",
            Reason::Unattached => c"unattached",
            Reason::Configuration => c"configuration",
            Reason::NoCommunicator => c"no_communicator",
            Reason::SwitchedOff => c"switched_off",
            Reason::NotFaster => c"not_faster",
        }
    }
}

/// The element type, when a request is one that may be ours; otherwise why it cannot be.
pub(crate) fn candidate(request: &Request, config: &Config) -> Result<ElementType, Reason> {
    if !config.enable {
        return Err(Reason::Disabled);
    }
    let element = match request.datatype {
        DataType::FLOAT16 => ElementType::Fp16,
        DataType::BFLOAT16 => ElementType::Bf16,
        DataType::FLOAT32 => ElementType::Fp32,
        _ => return Err(Reason::DataType),
    };
    if request.op != RedOp::SUM && request.op != RedOp::AVG {
        return Err(Reason::Operation);
    }
    if request.count == 0 {
        return Err(Reason::Empty);
    }
    Ok(element)
}

/// Where a candidate goes.
pub(crate) fn route(element: ElementType, request: &Request, verdict: Verdict, config: &Config) -> Route {
    let ways = match verdict {
        Verdict::Off => return Route::Forward(Reason::CommunicatorOff),
        Verdict::SwitchedOff => return Route::Forward(Reason::SwitchedOff),
        Verdict::Open => return Route::Forward(Reason::Unattached),
        Verdict::On(ways) => ways,
    };
    let is_coded = config.compresses(element);
    let (table, n_bytes) = (if is_coded { &ways.coded } else { &ways.plain }, request.n_bytes());
    match table.way(n_bytes) {
        Way::Compressed => Route::Compress(Carrier::Writes),
        Way::Pulled => Route::Compress(Carrier::Reads),
        Way::Copied => Route::Compress(Carrier::Copies),
        Way::ExactOneHop => Route::Exact { two_hops: false },
        Way::ExactTwoHops => Route::Exact { two_hops: true },
        Way::Forward if !is_coded => Route::Forward(Reason::DataType),
        Way::Forward if n_bytes < table.compress_min() && table.compress_min() != u64::MAX => {
            Route::Forward(Reason::Small)
        }
        Way::Forward => Route::Forward(Reason::NotFaster),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::{Table, Ways};

    /// Exact up to so many bytes, and compressed from so many on.
    fn ways(exact_max: u64, compress_min: u64) -> Ways {
        let plain = |n_bytes| if n_bytes <= exact_max { Way::ExactOneHop } else { Way::Forward };
        let coded = |n_bytes| match n_bytes {
            n_bytes if compress_min != u64::MAX && n_bytes >= compress_min => Way::Compressed,
            n_bytes => plain(n_bytes),
        };
        let starts = || [compress_min.min(exact_max + 1), compress_min.max(exact_max + 1)];
        Ways { coded: Table::new(starts(), coded), plain: Table::new(starts(), plain) }
    }
    /// `ncclInt8`.
    const INT8: DataType = DataType(0);

    fn decide(count: usize, datatype: DataType, op: RedOp, verdict: Verdict, config: &Config) -> Route {
        let request = Request { count, datatype, op };
        match candidate(&request, config) {
            Ok(element) => route(element, &request, verdict, config),
            Err(reason) => Route::Forward(reason),
        }
    }

    #[test]
    fn the_table() {
        use Route::Forward;
        const COMPRESS: Route = Route::Compress(Carrier::Writes);
        const EXACT: Route = Route::Exact { two_hops: false };
        // In two hops from a size on, and to the real NCCL again from another.
        let between = |n_bytes| match n_bytes {
            ..200 => Way::ExactTwoHops,
            200..400 => Way::Compressed,
            _ => Way::Forward,
        };
        let between = Table::new([200, 400], between);
        let between = Ways { coded: between, plain: Table::new([], |_| Way::Forward) };
        let usual = ways(600, 1000);
        let (all, exact, never) = (ways(600, 0), ways(600, u64::MAX), ways(0, u64::MAX));
        let (on, never) = (Verdict::On(&usual), Verdict::On(&never));
        let (fp16, bf16, fp32, sum) = (DataType::FLOAT16, DataType::BFLOAT16, DataType::FLOAT32, RedOp::SUM);
        let config = Config::default();
        let off = Config { enable: false, ..Config::default() };
        let bf16_only = Config { fp16: false, ..Config::default() };
        for (count, datatype, op, verdict, config, expected) in [
            (500, fp16, sum, on, &config, COMPRESS),
            (500, bf16, sum, on, &config, COMPRESS),
            (499, fp16, sum, on, &config, Forward(Reason::Small)),
            (301, fp16, sum, on, &config, Forward(Reason::Small)),
            (300, fp16, sum, on, &config, EXACT),
            (1, bf16, RedOp::AVG, on, &config, EXACT),
            (150, fp32, sum, on, &config, EXACT),
            (151, fp32, sum, on, &config, Forward(Reason::DataType)),
            (5000, fp32, sum, on, &config, Forward(Reason::DataType)),
            (usize::MAX, fp32, sum, Verdict::On(&all), &config, Forward(Reason::DataType)),
            (1, fp16, sum, Verdict::On(&all), &config, COMPRESS),
            (300, fp16, sum, Verdict::On(&exact), &config, EXACT),
            (301, fp16, sum, Verdict::On(&exact), &config, Forward(Reason::NotFaster)),
            (1, fp16, sum, never, &config, Forward(Reason::NotFaster)),
            (usize::MAX, fp16, sum, never, &config, Forward(Reason::NotFaster)),
            (usize::MAX, fp16, sum, on, &config, COMPRESS),
            (99, fp16, sum, Verdict::On(&between), &config, Route::Exact { two_hops: true }),
            (100, fp16, sum, Verdict::On(&between), &config, COMPRESS),
            (200, fp16, sum, Verdict::On(&between), &config, Forward(Reason::NotFaster)),
            (100, fp32, sum, Verdict::On(&between), &config, Forward(Reason::DataType)),
            (500, fp16, sum, Verdict::Open, &config, Forward(Reason::Unattached)),
            (1, bf16, sum, Verdict::Open, &config, Forward(Reason::Unattached)),
            (500, fp16, sum, Verdict::Off, &config, Forward(Reason::CommunicatorOff)),
            (1, fp16, sum, Verdict::SwitchedOff, &config, Forward(Reason::SwitchedOff)),
            (0, fp16, sum, on, &config, Forward(Reason::Empty)),
            (1, INT8, sum, on, &config, Forward(Reason::DataType)),
            (500, fp16, RedOp(1), on, &config, Forward(Reason::Operation)),
            (500, fp16, RedOp::AVG, on, &config, COMPRESS),
            (1, fp16, RedOp(3), on, &config, Forward(Reason::Operation)),
            (500, fp16, RedOp(5), on, &config, Forward(Reason::Operation)), // a user-defined one
            (500, fp16, sum, on, &off, Forward(Reason::Disabled)),
            (500, fp16, sum, on, &bf16_only, Forward(Reason::DataType)),
            (300, fp16, sum, on, &bf16_only, EXACT),
        ] {
            let got = decide(count, datatype, op, verdict, config);
            assert_eq!(got, expected, "{count} {datatype:?} {op:?} {verdict:?}");
        }
    }
}
