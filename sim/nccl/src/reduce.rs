//! The arithmetic: integers modulo their width, floating-point numbers in double precision, rounded once.

use half::{bf16, f16};

use crate::types::{DataType, RedOp};

/// Elements after which the shim's measurements repeat, a tile of its codes.
const PERIOD: usize = 4096;

/// Reduces equally long inputs in rank order into `output`. `scalars`: one for each input, for PreMulSum.
pub fn reduce(datatype: DataType, op: RedOp, inputs: &[&[u8]], scalars: Option<&[[u8; 8]]>, output: &mut [u8]) {
    let n = datatype.n_bytes();
    // Inputs that repeat after one value, or, as measurements have them, after some: much is summed that way.
    let repeat_after = |n_bytes: &usize| {
        inputs.iter().all(|input| input.len() > *n_bytes && input[*n_bytes..] == input[..input.len() - n_bytes])
    };
    if let Some(n_bytes) = [n, n * PERIOD].into_iter().find(repeat_after) {
        let first: Vec<&[u8]> = inputs.iter().map(|input| &input[..n_bytes]).collect();
        reduce(datatype, op, &first, scalars, &mut output[..n_bytes]);
        let (first, rest) = output.split_at_mut(n_bytes);
        return rest.chunks_mut(n_bytes).for_each(|out| out.copy_from_slice(&first[..out.len()]));
    }
    let is_float = datatype.number() >= 6;
    for (i, out) in output.chunks_exact_mut(n).enumerate() {
        let elements = inputs.iter().map(|input| &input[i * n..(i + 1) * n]);
        if is_float {
            let scalar = |rank: usize| scalars.map_or(1.0, |scalars| to_f64(datatype, &scalars[rank][..n]));
            let values = elements.enumerate().map(|(rank, bytes)| to_f64(datatype, bytes) * scalar(rank));
            let combined = values.reduce(|a, b| match op {
                RedOp::Prod => a * b,
                RedOp::Max => a.max(b),
                RedOp::Min => a.min(b),
                _ => a + b,
            });
            let combined = combined.unwrap_or(0.0) / if op == RedOp::Avg { inputs.len() as f64 } else { 1.0 };
            from_f64(datatype, combined, out);
        } else {
            let scalar = |rank: usize| scalars.map_or(1, |scalars| to_i128(datatype, &scalars[rank][..n]));
            let values = elements.enumerate().map(|(rank, bytes)| to_i128(datatype, bytes).wrapping_mul(scalar(rank)));
            let combined = values.reduce(|a, b| match op {
                RedOp::Prod => a.wrapping_mul(b),
                RedOp::Max => a.max(b),
                RedOp::Min => a.min(b),
                _ => a.wrapping_add(b),
            });
            let combined = combined.unwrap_or(0) / if op == RedOp::Avg { inputs.len() as i128 } else { 1 };
            out.copy_from_slice(&combined.to_le_bytes()[..n]);
        }
    }
}

fn to_i128(datatype: DataType, bytes: &[u8]) -> i128 {
    let is_signed = matches!(datatype.number(), 0 | 2 | 4);
    let fill = if is_signed && bytes[bytes.len() - 1] & 0x80 != 0 { 0xff } else { 0 };
    let mut wide = [fill; 16];
    wide[..bytes.len()].copy_from_slice(bytes);
    i128::from_le_bytes(wide)
}

fn to_f64(datatype: DataType, bytes: &[u8]) -> f64 {
    let word = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
    match datatype.number() {
        6 => f16::from_bits(word(bytes)).to_f64(),
        7 => f64::from(f32::from_le_bytes(bytes.try_into().expect("4 bytes"))),
        8 => f64::from_le_bytes(bytes.try_into().expect("8 bytes")),
        9 => bf16::from_bits(word(bytes)).to_f64(),
        10 => fp8_value(bytes[0], 4),
        _ => fp8_value(bytes[0], 5),
    }
}

fn from_f64(datatype: DataType, value: f64, out: &mut [u8]) {
    match datatype.number() {
        6 => out.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
        7 => out.copy_from_slice(&(value as f32).to_le_bytes()),
        8 => out.copy_from_slice(&value.to_le_bytes()),
        9 => out.copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
        10 => out[0] = fp8_code(value, 4),
        _ => out[0] = fp8_code(value, 5),
    }
}

/// The value of an fp8 code with 4 exponent bits (e4m3, no infinities) or 5 (e5m2).
fn fp8_value(code: u8, exponent_bits: u32) -> f64 {
    let mantissa_bits = 7 - exponent_bits;
    let (exponent, mantissa) = ((code & 0x7f) >> mantissa_bits, code & ((1 << mantissa_bits) - 1));
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let bias = (1 << (exponent_bits - 1)) - 1;
    match (exponent_bits, code & 0x7f) {
        (4, 0x7f) | (5, 0x7d..) => return f64::NAN,
        (5, 0x7c) => return sign * f64::INFINITY,
        _ => {}
    }
    let fraction = f64::from(mantissa) / f64::from(1u32 << mantissa_bits);
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(1 - bias),
        _ => (1.0 + fraction) * 2f64.powi(i32::from(exponent) - bias),
    };
    sign * magnitude
}

/// The nearest code, ties to even; what is too large becomes the largest finite one.
fn fp8_code(value: f64, exponent_bits: u32) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    let largest = if exponent_bits == 4 { 0x7e } else { 0x7b };
    let nearest = (0..=largest).min_by(|a, b| {
        let distance = |code: u8| (fp8_value(code, exponent_bits) - value.abs()).abs();
        distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1)))
    });
    nearest.unwrap_or(0) | if value.is_sign_negative() { 0x80 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_sums_and_averages_small_numbers() {
        for number in 0..12 {
            let datatype = DataType::new(number).unwrap();
            let n = datatype.n_bytes();
            let encode = |value: i64| {
                let mut bytes = vec![0; n];
                match number >= 6 {
                    true => from_f64(datatype, value as f64, &mut bytes),
                    false => bytes.copy_from_slice(&value.to_le_bytes()[..n]),
                }
                bytes
            };
            let (two, four) = (encode(2), encode(4));
            let scalar = {
                let mut s = [0; 8];
                s[..n].copy_from_slice(&two);
                s
            };
            for (op, expected) in [
                (RedOp::Sum, 6),
                (RedOp::Prod, 8),
                (RedOp::Max, 4),
                (RedOp::Min, 2),
                (RedOp::Avg, 3),
                (RedOp::PreMulSum(crate::types::Scalar::Here(scalar)), 12),
            ] {
                let scalars = [scalar, scalar];
                let scalars = matches!(op, RedOp::PreMulSum(_)).then_some(&scalars[..]);
                let mut out = vec![0; n];
                reduce(datatype, op, &[&two, &four], scalars, &mut out);
                assert_eq!(out, encode(expected), "type {number} {op:?}");
                let mut many = vec![0; 5 * n];
                reduce(datatype, op, &[&two.repeat(5), &four.repeat(5)], scalars, &mut many);
                assert_eq!(many, out.repeat(5), "type {number} {op:?}, of one value each");
                let (mixed, fours) = ([four.repeat(4), two.clone()].concat(), four.repeat(5));
                reduce(datatype, op, &[&mixed, &fours], scalars, &mut many);
                let [most, last] = [(&four, &four), (&two, &four)].map(|(a, b)| {
                    let mut out = vec![0; n];
                    reduce(datatype, op, &[a, b], scalars, &mut out);
                    out
                });
                assert_eq!(many, [most.repeat(4), last].concat(), "type {number} {op:?}, of two");
            }
        }
    }
}
