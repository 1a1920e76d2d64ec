//! What ranks tell each other when they attach, and what of it keeps them from going on.
//!
//! A blob is [`BLOB_BYTES`] bytes, little-endian. Peers' blobs are checked like any input: a rank may run another
//! version, or garbage.

use flashcomm_wire::{Code, Codec, GroupSize, Legs, WIRE_VERSION, Width};

use super::agreement::{Agreement, difference};
use super::disagreement::Disagreement;
use crate::config::{ExchangeKind, Tune};
use crate::exchange::area::{OFFER_BYTES, Offer};

/// Bytes of a blob.
pub const BLOB_BYTES: usize = 320;

/// Where the offer begins; before it, fields of 8 bytes.
const OFFER_AT: usize = BLOB_BYTES - OFFER_BYTES;

/// Marks a blob: "flashcom" in ASCII.
const MAGIC: u64 = u64::from_le_bytes(*b"flashcom");

/// One rank's word in attach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Blob {
    /// The rank that speaks.
    pub rank: u32,
    /// Its settings.
    pub agreement: Agreement,
    /// Where it runs.
    pub location: Location,
    /// The ranks whose GPU's memory its own GPU reaches, as bits; 0 before it knows where they are.
    pub reaches: u16,
    /// The ranks whose GPU's memory is not to be used by its own, as bits: NCCL's variables say so.
    pub forbids: u16,
    /// The ranks with whose GPU its own has NVLink, as bits; its own among them.
    pub nvlinks: u16,
    /// The number of its attach; that of rank 0 names the communicator among the ranks of a process.
    pub attach: u64,
    /// Whether it could do what this round is about.
    pub ready: bool,
    /// Its receive area, in the round that is about it.
    pub offer: Offer,
}

/// Where a rank runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Location {
    /// Equal on ranks that one running kernel serves, containers included.
    pub boot: u64,
    /// The same, or what `NCCL_HOSTID` says.
    pub host: u64,
    /// Equal on ranks of what NCCL takes for one host.
    pub nccl_host: u64,
    /// Equal on ranks that can share memory of the host; 0 where there is none.
    pub shared_memory: u64,
    /// Tells processes of the host apart.
    pub process: u64,
    /// The device, as the process numbers it.
    pub device: i32,
    /// The device, whoever numbers it.
    pub device_uuid: [u8; 16],
    /// Its multiprocessors.
    pub multiprocessors: usize,
    /// Channels that a block of the fused kernel may have there.
    pub block_channels: usize,
    /// The family of communicators for which the device keeps its large share ([`Seat::family`]).
    ///
    /// [`Seat::family`]: crate::exchange::residency::Seat::family
    pub family: u64,
}

impl Blob {
    /// The bytes that travel.
    pub fn encode(&self) -> [u8; BLOB_BYTES] {
        let Agreement {
            legs,
            min_bytes,
            exact_max,
            dtypes,
            exchange,
            buffer_bytes,
            max_ctas,
            p2p_read,
            host_copy,
            tune,
            plugin,
            switched_off,
        } = self.agreement;
        let location = &self.location;
        let (uuid, _) = location.device_uuid.as_chunks::<8>();
        let fields = [
            MAGIC,
            u64::from(WIRE_VERSION),
            u64::from(self.rank),
            u64::from(self.ready),
            location.host,
            u64::from(legs.reduce.width.bits()),
            u64::from(legs.gather.width.bits()),
            legs.reduce.group.n_elems() as u64,
            min_bytes.unwrap_or(u64::MAX),
            flags([
                dtypes.0,
                dtypes.1,
                switched_off,
                legs.batch_invariant,
                plugin,
                p2p_read.is_some(),
                p2p_read == Some(true),
                host_copy.is_some(),
                host_copy == Some(true),
            ]),
            exchange.map_or(0, |kind| 1 + kind as u64),
            buffer_bytes as u64,
            u64::from(max_ctas),
            location.process,
            u64::from(location.device as u32),
            u64::from_le_bytes(uuid[0]),
            u64::from_le_bytes(uuid[1]),
            location.multiprocessors as u64,
            location.block_channels as u64,
            self.attach,
            legs.code() as u64,
            u64::from(self.reaches),
            u64::from(self.forbids),
            location.nccl_host,
            location.shared_memory,
            location.boot,
            location.family,
            exact_max.unwrap_or(u64::MAX),
            tune as u64,
            u64::from(self.nvlinks),
        ];
        let mut bytes = [0; BLOB_BYTES];
        for (place, field) in bytes[..OFFER_AT].chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes[OFFER_AT..][..OFFER_BYTES].copy_from_slice(&self.offer);
        bytes
    }

    /// Reads a peer's blob; `Err` with its wire version if it has one, and it is not ours.
    pub fn decode(bytes: &[u8; BLOB_BYTES]) -> Result<Self, Option<u32>> {
        let field = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
        if field(0) != MAGIC {
            return Err(None);
        }
        if field(1) != u64::from(WIRE_VERSION) {
            return Err(Some(field(1) as u32));
        }
        let offer = bytes[OFFER_AT..][..OFFER_BYTES].try_into().expect("as many bytes");
        Self::decode_fields(field, offer).ok_or(None)
    }

    fn decode_fields(field: impl Fn(usize) -> u64, offer: Offer) -> Option<Self> {
        let width = |i| Width::new(u8::try_from(field(i)).ok()?);
        let group = GroupSize::new(u16::try_from(field(7)).ok()?)?;
        let code = *Code::ALL.get(usize::try_from(field(20)).ok()?)?;
        let codec = |width| Codec { width, group, code };
        // What no settings and no device give is not ours; and settings that look alike when told are alike.
        let within = |i, min: u64, max: u64| Some(field(i)).filter(|value| (min..=max).contains(value));
        let flags = within(9, 0, 511).filter(|flags| flags & 3 != 0)?;
        Some(Self {
            rank: u32::try_from(field(2)).ok()?,
            ready: within(3, 0, 1)? == 1,
            offer,
            attach: field(19),
            reaches: u16::try_from(field(21)).ok()?,
            forbids: u16::try_from(field(22)).ok()?,
            nvlinks: u16::try_from(field(29)).ok()?,
            location: Location {
                host: field(4),
                nccl_host: field(23),
                shared_memory: field(24),
                boot: field(25),
                process: field(13),
                device: i32::try_from(field(14)).ok()?,
                device_uuid: [field(15).to_le_bytes(), field(16).to_le_bytes()].concat().try_into().ok()?,
                multiprocessors: within(17, 0, 1 << 16)? as usize,
                block_channels: within(18, 0, 1 << 16)? as usize,
                family: field(26),
            },
            agreement: Agreement {
                legs: Legs::new(codec(width(5)?), codec(width(6)?))?.with_batch_invariant(flags & 8 != 0),
                min_bytes: Some(field(8)).filter(|n_bytes| *n_bytes != u64::MAX),
                exact_max: Some(field(27)).filter(|n_bytes| *n_bytes != u64::MAX),
                dtypes: (flags & 1 != 0, flags & 2 != 0),
                switched_off: flags & 4 != 0,
                p2p_read: (flags & 32 != 0).then_some(flags & 64 != 0),
                host_copy: (flags & 128 != 0).then_some(flags & 256 != 0),
                tune: *Tune::ALL.get(usize::try_from(field(28)).ok()?)?,
                plugin: flags & 16 != 0,
                exchange: match field(10) {
                    0 => None,
                    number => Some(*ExchangeKind::ALL.get(usize::try_from(number - 1).ok()?)?),
                },
                buffer_bytes: within(11, 1 << 20, 16384 << 20).filter(|n_bytes| n_bytes % (1 << 20) == 0)? as usize,
                max_ctas: within(12, 0, 1024)? as u32,
            },
        })
    }
}

/// Bits, the first one lowest.
fn flags(bits: [bool; 9]) -> u64 {
    bits.into_iter().enumerate().map(|(i, bit)| u64::from(bit) << i).sum()
}

/// The verdict over all ranks' blobs, in rank order: the blobs, or the first thing that keeps the communicator off.
/// Every rank sees the same bytes, so every rank comes to the same end.
pub fn agree(gathered: &[u8]) -> Result<Vec<Blob>, Disagreement> {
    let mut blobs: Vec<Blob> = Vec::new();
    for (rank, bytes) in gathered.chunks_exact(BLOB_BYTES).enumerate() {
        let bytes = bytes.try_into().expect("a chunk is a blob");
        let blob = Blob::decode(bytes).map_err(|version| Disagreement::Foreign { rank, version })?;
        if blob.rank as usize != rank {
            return Err(Disagreement::Foreign { rank, version: None });
        }
        let first = blobs.first().unwrap_or(&blob).agreement;
        if let Some((setting, theirs, first)) = difference(blob.agreement, first) {
            return Err(Disagreement::Setting { rank, setting, theirs, first });
        }
        blobs.push(blob);
    }
    match blobs.iter().position(|blob| !blob.ready) {
        Some(rank) => Err(Disagreement::NotReady { rank }),
        None => Ok(blobs),
    }
}

/// Ranks that share a device at most.
pub(super) fn sharing(facts: &[Blob]) -> usize {
    let sharing =
        |rank: &Blob| facts.iter().filter(|other| other.location.device_uuid == rank.location.device_uuid).count();
    facts.iter().map(sharing).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;

    fn blob(rank: u32) -> Blob {
        let device_uuid = *b"0123456789abcdef";
        let location = Location {
            boot: 6,
            host: 7,
            nccl_host: 17,
            shared_memory: 18,
            process: 8,
            device: 3,
            device_uuid,
            multiprocessors: 132,
            block_channels: 7,
            family: 19,
        };
        let offer = std::array::from_fn(|i| i as u8);
        Blob {
            rank,
            agreement: Agreement::from(&Config::default()),
            location,
            reaches: 5,
            forbids: 2,
            nvlinks: 4,
            attach: 9,
            ready: true,
            offer,
        }
    }

    fn gather(blobs: &[Blob]) -> Vec<u8> {
        blobs.iter().flat_map(Blob::encode).collect()
    }

    fn with(rank: u32, name: &str, value: &str) -> Blob {
        let (config, _) = Config::parse(|asked| (asked == name).then(|| value.into()));
        Blob { agreement: Agreement::from(&config), ..blob(rank) }
    }

    #[test]
    fn equal_settings_agree() {
        let blobs = [blob(0), blob(1), blob(2)];
        assert_eq!(agree(&gather(&blobs)), Ok(blobs.to_vec()));
    }

    #[test]
    fn every_shared_setting_that_differs_is_named_with_rank_and_values() {
        for (name, value) in [
            ("FLASHCOMM_BITS", "4:6"),
            ("FLASHCOMM_GROUP", "128"),
            ("FLASHCOMM_CODE", "plain"),
            ("FLASHCOMM_BATCH_INVARIANT", "1"),
            ("FLASHCOMM_MIN_BYTES", "77"),
            ("FLASHCOMM_EXACT_MAX_BYTES", "77"),
            ("FLASHCOMM_DTYPES", "bf16"),
            ("FLASHCOMM_EXCHANGE", "nccl"),
            ("FLASHCOMM_BUFFER_MIB", "3"),
            ("FLASHCOMM_MAX_CTAS", "24"),
            ("FLASHCOMM_P2P_READ", "1"),
            ("FLASHCOMM_HOST_COPY", "0"),
            ("FLASHCOMM_TUNE", "always"),
            ("FLASHCOMM_PLUGIN", "1"),
        ] {
            let error = agree(&gather(&[blob(0), blob(1), with(2, name, value)])).unwrap_err();
            let Disagreement::Setting { rank: 2, setting, theirs, .. } = &error else { panic!("{error:?}") };
            assert_eq!((*setting, theirs.as_str()), (name, value));
            assert!(error.to_string().contains(name) && error.to_string().contains("rank 2"));
        }
        let shared = crate::config::table::SETTINGS.iter().filter(|setting| setting.same_on_all_ranks).count();
        assert_eq!(shared, 15, "fourteen are compared here; a rank with FLASHCOMM_ENABLE=0 never attaches");
    }

    #[test]
    fn a_rank_that_asks_for_on_while_another_asks_for_off_is_named() {
        let mut off = blob(1);
        off.agreement.switched_off = true;
        let error = agree(&gather(&[blob(0), off])).unwrap_err().to_string();
        assert!(error.contains("rank 1 has flashcommSetCommEnabled=0, rank 0 has 1"), "{error}");
        off.rank = 0;
        let (first, second) = (off, Blob { rank: 1, ..off });
        assert_eq!(agree(&gather(&[first, second])), Ok(vec![first, second]));
    }

    #[test]
    fn a_rank_that_is_not_ready_keeps_all_off() {
        let late = Blob { ready: false, ..blob(1) };
        assert_eq!(agree(&gather(&[blob(0), late])), Err(Disagreement::NotReady { rank: 1 }));
    }

    #[test]
    fn other_versions_and_swapped_ranks_are_foreign() {
        let mut other = blob(1).encode();
        other[8] = 99;
        let gathered = [blob(0).encode(), other].concat();
        assert_eq!(agree(&gathered), Err(Disagreement::Foreign { rank: 1, version: Some(99) }));
        assert_eq!(agree(&gather(&[blob(0), blob(2)])), Err(Disagreement::Foreign { rank: 1, version: None }));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), BLOB_BYTES), keep in 0usize..BLOB_BYTES) {
            let real = blob(0).encode();
            bytes[..keep].copy_from_slice(&real[..keep]);
            let _ = agree(&bytes);
        }
    }
}
