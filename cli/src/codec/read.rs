//! Tensors from files: .npy of numpy, and .safetensors, where those that `FLASHCOMM_RECORD` saved tell what they are.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use npyz::{DType, NpyFile, Order};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as Stored, TensorView};

use crate::client::rank::Dtype;

/// A tensor, as an all-reduce would have it.
pub struct Tensor {
    /// Its file, and its name there.
    pub name: String,
    /// Its elements in their order.
    pub values: Values,
    /// Elements of a row: of the last dimension.
    pub row: usize,
    /// The type that was rounded to get here, if any.
    pub rounded_from: Option<&'static str>,
    /// Of which all-reduce it is an input, where that is known.
    pub origin: Option<Origin>,
}

/// Elements of one of the types that are compressed.
#[derive(Clone, PartialEq, Debug)]
#[allow(missing_docs, reason = "they say it")]
pub enum Values {
    Fp16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// What a recorded input belongs to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Origin {
    /// The communicator's number, the same for all ranks.
    pub communicator: String,
    /// The call's number on it.
    pub call: u64,
    /// The rank whose input this is.
    pub rank: usize,
    /// Ranks of the communicator.
    pub world: usize,
}

impl Values {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Values::Fp16(values) => values.len(),
            Values::Bf16(values) => values.len(),
        }
    }

    /// Elements that are NaN or infinite.
    pub fn non_finite(&self) -> usize {
        match self {
            Values::Fp16(values) => values.iter().filter(|x| !x.is_finite()).count(),
            Values::Bf16(values) => values.iter().filter(|x| !x.is_finite()).count(),
        }
    }

    fn rounded(values: impl Iterator<Item = f64>, dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Values::Bf16(values.map(bf16::from_f64).collect()),
            _ => Values::Fp16(values.map(f16::from_f64).collect()),
        }
    }
}

/// The files that are named, and those with a known ending in the folders that are.
pub fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
        let entries =
            entries.collect::<Result<Vec<_>, _>>().with_context(|| format!("cannot read {}", path.display()))?;
        let mut known: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
        known.retain(|file| ["npy", "safetensors"].contains(&ending(file).as_str()));
        ensure!(
            !known.is_empty(),
            "{} holds no .npy and no .safetensors; a job under flashcomm run --record 16 --record-dir {0} fills it",
            path.display()
        );
        known.sort();
        files.append(&mut known);
    }
    Ok(files)
}

fn ending(path: &Path) -> String {
    path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// The tensors of a file, and what was left out of it and why. Types of more than 16 bits are rounded to `dtype`.
///
/// # Errors
/// Where it cannot be read or has nothing to measure; the message names what to do.
pub fn read(path: &Path, dtype: Dtype) -> Result<(Vec<Tensor>, Vec<String>)> {
    let ending = ending(path);
    let cure = match ending.as_str() {
        "npy" | "safetensors" => "",
        "npz" => "save each of its arrays with numpy.save",
        "pt" | "pth" | "bin" => "save it with safetensors.torch.save_file",
        _ => "save an array with numpy.save, or tensors with safetensors.torch.save_file",
    };
    ensure!(cure.is_empty(), "{} is neither .npy nor .safetensors; {cure}", path.display());
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (tensors, left_out) = match ending.as_str() {
        "npy" => (vec![npy(path, &bytes, dtype)?], vec![]),
        _ => safetensors(path, &bytes, dtype)?,
    };
    match tensors.iter().find(|tensor| tensor.values.len() == 0) {
        Some(empty) => bail!("{} has no elements; leave it out", empty.name),
        None => Ok((tensors, left_out)),
    }
}

const AS_FLOATS: &str = "save it as fp16 or fp32 (x.astype(numpy.float32)), or a bf16 one as .safetensors";

fn npy(path: &Path, bytes: &[u8], dtype: Dtype) -> Result<Tensor> {
    let name = path.display().to_string();
    let damaged = || format!("{name} is no .npy, or damaged: save it again with numpy.save");
    let file = NpyFile::new(bytes).with_context(damaged)?;
    let DType::Plain(stored) = file.dtype() else { bail!("{name} holds records, no numbers; {AS_FLOATS}") };
    let elements = file.shape().iter().try_fold(1u64, |product, n| product.checked_mul(*n));
    let fits = elements.is_some_and(|n| n <= bytes.len() as u64);
    ensure!(fits, "{name} is shorter than its header says: copy or save it again");
    ensure!(
        file.order() == Order::C || file.shape().len() < 2,
        "{name} is stored by columns, which an all-reduce would not see so; save numpy.ascontiguousarray(x)"
    );
    let row = file.shape().last().map_or(1, |n| *n as usize);
    let stored = stored.to_string();
    let (values, rounded_from) = match stored.trim_start_matches(['<', '>', '=', '|']) {
        "f2" => (Values::Fp16(file.into_vec().with_context(damaged)?), None),
        "f4" => {
            let values: Vec<f32> = file.into_vec().with_context(damaged)?;
            (Values::rounded(values.into_iter().map(f64::from), dtype), Some("fp32"))
        }
        "f8" => (Values::rounded(file.into_vec().with_context(damaged)?.into_iter(), dtype), Some("fp64")),
        "V2" => {
            bail!("{name} has elements of type {stored}, as numpy writes bf16, but they may be anything; {AS_FLOATS}")
        }
        _ => bail!("{name} has elements of type {stored}; {AS_FLOATS}"),
    };
    Ok(Tensor { name, values, row, rounded_from, origin: None })
}

fn safetensors(path: &Path, bytes: &[u8], dtype: Dtype) -> Result<(Vec<Tensor>, Vec<String>)> {
    let file = path.display();
    let damaged = || format!("{file} is no .safetensors, or damaged or cut off: copy or save it again");
    let all = SafeTensors::deserialize(bytes).with_context(damaged)?;
    let (_, header) = SafeTensors::read_metadata(bytes).with_context(damaged)?;
    let origin = header.metadata().as_ref().and_then(origin);
    let mut views = all.tensors();
    views.sort_by(|(a, _), (b, _)| a.cmp(b));
    let (mut tensors, mut left_out) = (Vec::new(), Vec::new());
    for (tensor, view) in views {
        let name = if origin.is_some() { file.to_string() } else { format!("{file}: {tensor}") };
        match values(&view, dtype) {
            Some((values, rounded_from)) => {
                let row = view.shape().last().copied().unwrap_or(1);
                tensors.push(Tensor { name, values, row, rounded_from, origin: origin.clone() });
            }
            None => left_out.push(format!("{name}: elements of type {:?}", view.dtype())),
        }
    }
    if origin.is_some() {
        ensure!(tensors.len() == 1, "{file} says that it was recorded, but has not one tensor: record again");
    }
    ensure!(!tensors.is_empty(), "{file} has no tensor of fp16, bf16 or fp32; convert one (x.to(torch.bfloat16))");
    Ok((tensors, left_out))
}

fn values(view: &TensorView<'_>, dtype: Dtype) -> Option<(Values, Option<&'static str>)> {
    let pairs = || view.data().chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    match view.dtype() {
        Stored::F16 => Some((Values::Fp16(pairs().map(f16::from_bits).collect()), None)),
        Stored::BF16 => Some((Values::Bf16(pairs().map(bf16::from_bits).collect()), None)),
        Stored::F32 => {
            let fours = view.data().chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().expect("four")));
            Some((Values::rounded(fours.map(f64::from), dtype), Some("fp32")))
        }
        _ => None,
    }
}

/// What [`flashcomm::record`] wrote into the header; `None` for a file of someone else's.
fn origin(header: &HashMap<String, String>) -> Option<Origin> {
    header.get("flashcomm")?;
    let number = |name: &str| header.get(name)?.parse::<u64>().ok();
    let (rank, world) = (number("rank")? as usize, number("world")? as usize);
    let communicator = header.get("communicator")?.clone();
    Some(Origin { communicator, call: number("call")?, rank, world })
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::serialize;

    use super::*;

    /// A .npy with this header and these bytes behind it.
    fn npy_bytes(dtype: &str, order: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}");
        let n_bytes = (header.len() + 11).next_multiple_of(64) - 10;
        let header = format!("{header:<width$}\n", width = n_bytes - 1);
        [b"\x93NUMPY\x01\x00", &(n_bytes as u16).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    fn safetensors_bytes(dtype: Stored, shape: &[usize], data: &[u8], header: &[(&str, &str)]) -> Vec<u8> {
        let view = TensorView::new(dtype, shape.to_vec(), data).unwrap();
        let header = header.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        serialize([("x", view)], Some(header)).unwrap()
    }

    fn read_bytes(name: &str, bytes: &[u8], dtype: Dtype) -> Result<(Vec<Tensor>, Vec<String>)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        read(&path, dtype)
    }

    const NUMBERS: [f32; 6] = [0.0, -1.5, 3.0, 0.1, 65504.0, -7.0];

    fn bytes_of<const N: usize>(to_bytes: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
        NUMBERS.iter().flat_map(|x| to_bytes(*x)).collect()
    }

    #[test]
    fn every_type_is_read_and_wider_ones_are_rounded() {
        let fp16 = Values::Fp16(NUMBERS.map(f16::from_f32).to_vec());
        let bf16 = Values::Bf16(NUMBERS.map(bf16::from_f32).to_vec());
        let half = bytes_of(|x| f16::from_f32(x).to_le_bytes());
        let (single, double) = (bytes_of(f32::to_le_bytes), bytes_of(|x| f64::from(x).to_le_bytes()));
        let npy = |dtype: &str, data: &[u8]| ("x.npy", npy_bytes(dtype, "False", "(2, 3)", data));
        let tensors = |dtype, data: &[u8]| ("x.SafeTensors", safetensors_bytes(dtype, &[2, 3], data, &[]));
        for ((name, bytes), dtype, expected, rounded_from) in [
            (npy("<f2", &half), Dtype::Bf16, &fp16, None),
            (npy(">f2", &bytes_of(|x| f16::from_f32(x).to_be_bytes())), Dtype::Fp16, &fp16, None),
            (npy("<f4", &single), Dtype::Fp16, &fp16, Some("fp32")),
            (npy("<f4", &single), Dtype::Bf16, &bf16, Some("fp32")),
            (npy("<f8", &double), Dtype::Bf16, &bf16, Some("fp64")),
            (tensors(Stored::F16, &half), Dtype::Bf16, &fp16, None),
            (tensors(Stored::BF16, &bytes_of(|x| bf16::from_f32(x).to_le_bytes())), Dtype::Fp16, &bf16, None),
            (tensors(Stored::F32, &single), Dtype::Fp16, &fp16, Some("fp32")),
        ] {
            let (tensors, left_out) = read_bytes(name, &bytes, dtype).unwrap();
            let [tensor] = &tensors[..] else { panic!("{}", tensors.len()) };
            assert_eq!((&tensor.values, tensor.rounded_from, tensor.row), (expected, rounded_from, 3), "{name}");
            assert!(tensor.origin.is_none() && left_out.is_empty());
        }
    }

    #[test]
    fn what_cannot_be_read_names_the_cure() {
        let half = bytes_of(|x| f16::from_f32(x).to_le_bytes());
        let whole = npy_bytes("<f2", "False", "(2, 3)", &half);
        let tensors = safetensors_bytes(Stored::F16, &[6], &half, &[]);
        let mut long_header = tensors.clone();
        long_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let recorded = [("flashcomm", "1"), ("communicator", "ab"), ("call", "1"), ("rank", "0"), ("world", "2")];
        for (name, bytes, said) in [
            ("x.pt", &whole[..], "safetensors.torch.save_file"),
            ("x.npz", &whole, "numpy.save"),
            ("x", &whole, "neither .npy nor .safetensors"),
            ("x.npy", b"", "save it again with numpy.save"),
            ("x.npy", b"not numpy's at all, though long enough", "save it again with numpy.save"),
            ("x.npy", &whole[..whole.len() - 1], "save it again"),
            ("x.npy", &whole[..20], "save it again with numpy.save"),
            ("x.npy", &npy_bytes("<f2", "False", "(2, 3000000000000)", &half), "shorter than its header says"),
            ("x.npy", &npy_bytes("<f2", "True", "(2, 3)", &half), "numpy.ascontiguousarray"),
            ("x.npy", &npy_bytes("<f2", "False", "(0, 3)", b""), "has no elements"),
            ("x.npy", &npy_bytes("<u2", "False", "(2, 3)", &half), "<u2"),
            ("x.npy", &npy_bytes("|V2", "False", "(2, 3)", &half), "as numpy writes bf16"),
            ("x.safetensors", b"", "copy or save it again"),
            ("x.safetensors", &tensors[..tensors.len() - 1], "copy or save it again"),
            ("x.safetensors", &long_header, "copy or save it again"),
            ("x.safetensors", &whole, "copy or save it again"),
            ("x.safetensors", &safetensors_bytes(Stored::I16, &[6], &half, &[]), "has no tensor of fp16, bf16 or fp32"),
            ("x.safetensors", &safetensors_bytes(Stored::F16, &[0], b"", &recorded), "has no elements"),
        ] {
            let error = format!("{:#}", read_bytes(name, bytes, Dtype::Fp16).err().expect(said));
            assert!(error.contains(said) && error.contains(name), "{said}: {error}");
        }
        let error = format!("{:#}", read(Path::new("/nowhere/x.npy"), Dtype::Fp16).err().unwrap());
        assert!(error.contains("cannot read /nowhere/x.npy"), "{error}");
        let empty = tempfile::tempdir().unwrap();
        let error = files(&[empty.path().into()]).unwrap_err().to_string();
        assert!(error.contains("flashcomm run --record"), "{error}");
    }

    #[test]
    fn a_recorded_input_tells_where_it_is_from() {
        let data = f16::ONE.to_le_bytes();
        let recorded = [("flashcomm", "0"), ("communicator", "ab"), ("call", "12"), ("rank", "1"), ("world", "2")];
        let (tensors, _) =
            read_bytes("x.safetensors", &safetensors_bytes(Stored::F16, &[1], &data, &recorded), Dtype::Fp16).unwrap();
        let expected = Origin { communicator: "ab".into(), call: 12, rank: 1, world: 2 };
        assert_eq!(tensors[0].origin, Some(expected));
        for missing in 0..recorded.len() {
            let rest: Vec<_> =
                recorded.iter().enumerate().filter(|(i, _)| *i != missing).map(|(_, pair)| *pair).collect();
            let bytes = safetensors_bytes(Stored::F16, &[1], &data, &rest);
            assert_eq!(read_bytes("x.safetensors", &bytes, Dtype::Fp16).unwrap().0[0].origin, None);
        }
    }
}
