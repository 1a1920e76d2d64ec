//! Every function that NCCL 2.32.3 exports, and the version in which it appeared, as data.
//!
//! `own`: src/abi defines it in Rust, with its real signature; `jump`: a bare jump into the real library serves it.
//! `pncclX` is the twin of NCCL's profiling interface. The kind of the return value says what a missing function
//! answers. Functions given as of 2.3.5 are as old as the oldest public source.

/// Calls `$callback!` with a row `how name twin kind major minor patch;` for each function.
macro_rules! for_each_symbol {
    ($callback:ident) => {
        $callback! {
            own  ncclAllGather pncclAllGather Result 2 3 5;
            own  ncclAllGatherConfig pncclAllGatherConfig Result 2 31 2;
            own  ncclAllReduce pncclAllReduce Result 2 3 5;
            own  ncclAllReduceConfig pncclAllReduceConfig Result 2 31 2;
            own  ncclAlltoAll pncclAlltoAll Result 2 28 3;
            own  ncclAlltoAllConfig pncclAlltoAllConfig Result 2 31 2;
            own  ncclBcast pncclBcast Result 2 3 5;
            own  ncclBroadcast pncclBroadcast Result 2 3 5;
            own  ncclBroadcastConfig pncclBroadcastConfig Result 2 31 2;
            own  ncclCommAbort pncclCommAbort Result 2 4 2;
            jump ncclCommCount pncclCommCount Result 2 3 5;
            jump ncclCommCuDevice pncclCommCuDevice Result 2 3 5;
            jump ncclCommDeregister pncclCommDeregister Result 2 19 1;
            own  ncclCommDestroy pncclCommDestroy Result 2 3 5;
            jump ncclCommFinalize pncclCommFinalize Result 2 14 3;
            own  ncclCommGetAsyncError pncclCommGetAsyncError Result 2 4 2;
            jump ncclCommGetUniqueId pncclCommGetUniqueId Result 2 29 2;
            own  ncclCommGrow pncclCommGrow Result 2 29 2;
            own  ncclCommInitAll pncclCommInitAll Result 2 3 5;
            own  ncclCommInitRank pncclCommInitRank Result 2 3 5;
            own  ncclCommInitRankConfig pncclCommInitRankConfig Result 2 14 3;
            own  ncclCommInitRankScalable pncclCommInitRankScalable Result 2 23 4;
            jump ncclCommMemStats pncclCommMemStats Result 2 29 7;
            jump ncclCommQueryProperties pncclCommQueryProperties Result 2 29 2;
            jump ncclCommRegister pncclCommRegister Result 2 19 1;
            jump ncclCommResume pncclCommResume Result 2 29 7;
            own  ncclCommRevoke pncclCommRevoke Result 2 28 7;
            own  ncclCommShrink pncclCommShrink Result 2 27 3;
            own  ncclCommSplit pncclCommSplit Result 2 18 1;
            jump ncclCommSuspend pncclCommSuspend Result 2 29 7;
            jump ncclCommUserRank pncclCommUserRank Result 2 3 5;
            jump ncclCommWindowDeregister pncclCommWindowDeregister Result 2 27 3;
            jump ncclCommWindowRegister pncclCommWindowRegister Result 2 27 3;
            jump ncclDevCommCreate pncclDevCommCreate Result 2 28 3;
            jump ncclDevCommDestroy pncclDevCommDestroy Result 2 28 3;
            own  ncclGather pncclGather Result 2 28 3;
            own  ncclGatherConfig pncclGatherConfig Result 2 31 2;
            jump ncclGetCftDeviceLeInfo pncclGetCftDeviceLeInfo Result 2 31 2;
            jump ncclGetErrorString pncclGetErrorString String 2 3 5;
            own  ncclGetLastError pncclGetLastError String 2 13 4;
            jump ncclGetLsaDevicePointer pncclGetLsaDevicePointer Result 2 29 2;
            jump ncclGetLsaMultimemDevicePointer pncclGetLsaMultimemDevicePointer Result 2 29 2;
            jump ncclGetMultimemDeviceLeInfo pncclGetMultimemDeviceLeInfo Result 2 31 2;
            jump ncclGetMultimemDevicePointer pncclGetMultimemDevicePointer Result 2 29 2;
            jump ncclGetPeerDeviceLeInfo pncclGetPeerDeviceLeInfo Result 2 31 2;
            jump ncclGetPeerDevicePointer pncclGetPeerDevicePointer Result 2 29 2;
            jump ncclGetUniqueId pncclGetUniqueId Result 2 3 5;
            jump ncclGetVersion pncclGetVersion Result 2 3 5;
            jump ncclGinBarrierCreateRequirement pncclGinBarrierCreateRequirement Result 2 28 9;
            jump ncclGinInboxA2ACreateRequirement pncclGinInboxA2ACreateRequirement Result 2 29 7;
            jump ncclGinOutboxCreateRequirement pncclGinOutboxCreateRequirement Result 2 29 7;
            own  ncclGroupEnd pncclGroupEnd Result 2 3 5;
            own  ncclGroupSimulateEnd pncclGroupSimulateEnd Result 2 22 3;
            own  ncclGroupStart pncclGroupStart Result 2 3 5;
            jump ncclLLA2ACalcSlots pncclLLA2ACalcSlots Int 2 28 3;
            jump ncclLLA2ACreateRequirement pncclLLA2ACreateRequirement Result 2 28 3;
            jump ncclLsaBarrierCreateRequirement pncclLsaBarrierCreateRequirement Result 2 28 3;
            jump ncclMemAlloc pncclMemAlloc Result 2 19 1;
            jump ncclMemFree pncclMemFree Result 2 19 1;
            jump ncclParamBind pncclParamBind Result 2 30 3;
            jump ncclParamDumpAll pncclParamDumpAll Void 2 30 3;
            jump ncclParamGet pncclParamGet Result 2 30 3;
            jump ncclParamGetAllParameterKeys pncclParamGetAllParameterKeys Result 2 30 3;
            jump ncclParamGetI16 pncclParamGetI16 Result 2 30 3;
            jump ncclParamGetI32 pncclParamGetI32 Result 2 30 3;
            jump ncclParamGetI64 pncclParamGetI64 Result 2 30 3;
            jump ncclParamGetI8 pncclParamGetI8 Result 2 30 3;
            jump ncclParamGetParameter pncclParamGetParameter Result 2 30 3;
            jump ncclParamGetStr pncclParamGetStr Result 2 30 3;
            jump ncclParamGetU16 pncclParamGetU16 Result 2 30 3;
            jump ncclParamGetU32 pncclParamGetU32 Result 2 30 3;
            jump ncclParamGetU64 pncclParamGetU64 Result 2 30 3;
            jump ncclParamGetU8 pncclParamGetU8 Result 2 30 3;
            jump ncclPutSignal pncclPutSignal Result 2 29 2;
            own  ncclRecv pncclRecv Result 2 7 3;
            jump ncclRedOpCreatePreMulSum pncclRedOpCreatePreMulSum Result 2 11 4;
            jump ncclRedOpDestroy pncclRedOpDestroy Result 2 11 4;
            own  ncclReduce pncclReduce Result 2 3 5;
            own  ncclReduceConfig pncclReduceConfig Result 2 31 2;
            own  ncclReduceScatter pncclReduceScatter Result 2 3 5;
            own  ncclReduceScatterConfig pncclReduceScatterConfig Result 2 31 2;
            jump ncclResetDebugInit pncclResetDebugInit Void 2 24 3;
            jump ncclResetDebugInitInternal pncclResetDebugInitInternal Void 2 28 3;
            own  ncclScatter pncclScatter Result 2 28 3;
            own  ncclScatterConfig pncclScatterConfig Result 2 31 2;
            own  ncclSend pncclSend Result 2 7 3;
            jump ncclSetEncryption pncclSetEncryption Result 2 32 3;
            jump ncclSignal pncclSignal Result 2 29 2;
            jump ncclTeamCft pncclTeamCft Team 2 31 2;
            jump ncclTeamCftMultimem pncclTeamCftMultimem Team 2 31 2;
            jump ncclTeamLsa pncclTeamLsa Team 2 28 3;
            jump ncclTeamRail pncclTeamRail Team 2 28 3;
            jump ncclTeamRankToLsa pncclTeamRankToLsa Int 2 28 3;
            jump ncclTeamRankToWorld pncclTeamRankToWorld Int 2 28 3;
            jump ncclTeamWorld pncclTeamWorld Team 2 28 3;
            jump ncclWaitSignal pncclWaitSignal Result 2 29 2;
            jump ncclWinGetUserPtr pncclWinGetUserPtr Result 2 29 2;
        }
    };
}
pub(crate) use for_each_symbol;

/// What a function returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `ncclResult_t`.
    Result,
    /// `const char*`.
    String,
    /// Nothing.
    Void,
    /// `int`.
    Int,
    /// `ncclTeam_t`, a structure of three ints by value.
    Team,
}

/// A version of NCCL.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// From `ncclGetVersion`'s integer (2.8 and older count in thousands).
    pub fn from_code(code: u32) -> Self {
        let major = if code < 10_000 { 1_000 } else { 10_000 };
        Version(code / major, code % major / 100, code % 100)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

macro_rules! define_symbols {
    ($($how:ident $name:ident $twin:ident $kind:ident $major:literal $minor:literal $patch:literal;)*) => {
        /// A function of the real library; its number is its slot in the jump table.
        #[allow(non_camel_case_types, missing_docs, reason = "NCCL's names")]
        #[repr(usize)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) enum Symbol {
            $($name, $twin,)*
        }

        /// Name, kind of the return value and first version of each [`Symbol`], in order.
        pub const SYMBOLS: &[(&str, Kind, Version)] = &[$(
            (stringify!($name), Kind::$kind, Version($major, $minor, $patch)),
            (stringify!($twin), Kind::$kind, Version($major, $minor, $patch)),
        )*];
    };
}
for_each_symbol!(define_symbols);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_97_functions_and_their_twins() {
        let twins: Vec<_> = SYMBOLS.iter().filter(|(name, ..)| name.starts_with('p')).collect();
        let names: Vec<_> = SYMBOLS.iter().filter(|(name, ..)| name.starts_with("nccl")).collect();
        assert_eq!((names.len(), twins.len()), (97, 97));
        assert_eq!(SYMBOLS[Symbol::pncclCommSplit as usize].0, "pncclCommSplit");
    }

    #[test]
    fn version_codes_of_both_forms_are_read() {
        assert_eq!(Version::from_code(23203), Version(2, 32, 3));
        assert_eq!(Version::from_code(2708), Version(2, 7, 8));
    }
}
