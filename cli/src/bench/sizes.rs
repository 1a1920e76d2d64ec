//! Sizes to measure, as they are given.

use std::str::FromStr;

use crate::Bytes;

/// One size, or `A..B`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sizes(pub Vec<Bytes>);

impl FromStr for Sizes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let Some((first, last)) = text.split_once("..") else {
            return Ok(Sizes(vec![text.parse()?]));
        };
        let (first, last): (Bytes, Bytes) = (first.parse()?, last.parse()?);
        if first.0 == 0 || first > last {
            return Err(format!("{text:?} is no range of sizes; write for example 256K..64M"));
        }
        Ok(Sizes(
            std::iter::successors(Some(first), |n| n.0.checked_mul(2).map(Bytes)).take_while(|n| *n <= last).collect(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_sizes_doubles_and_holds_its_ends() {
        let sizes = |text: &str| text.parse::<Sizes>().map(|sizes| sizes.0.iter().map(|n| n.0).collect::<Vec<_>>());
        assert_eq!(sizes("1K..4K"), Ok(vec![1024, 2048, 4096]));
        assert_eq!(sizes("1K..3K"), Ok(vec![1024, 2048]));
        assert_eq!(sizes("64"), Ok(vec![64]));
        assert!(sizes("4K..1K").is_err() && sizes("0..4").is_err() && sizes("..").is_err());
    }
}
