//! The Hadamard transform of a group: an outlier spreads over all of it, so that the extremes are near the rest.
//!
//! ```text
//! enter: each x / g, then for h = 1, 2, 4, .. g/2: the pair (a, b) at every distance h becomes (a + b, a - b)
//! leave: the same without the division
//! ```
//!
//! All in fp32, rounding to nearest. Distances below 8 lie within a thread, those above between lanes at distance h /
//! 8. The division is exact and keeps what is coded within the range of the inputs, so nothing overflows that would not
//! have; it is not the orthonormal 1/sqrt(g), which makes no difference to a code with a scale, and is not exact for 32
//! and 128. A NaN or an infinity spreads over the group.

/// Turns a whole group into what is coded and summed.
pub(super) fn enter(group: &mut [f32]) {
    let share = 1.0 / group.len() as f32;
    group.iter_mut().for_each(|x| *x *= share);
    leave(group);
}

/// Turns a whole group back.
pub(super) fn leave(group: &mut [f32]) {
    let mut distance = 1;
    while distance < group.len() {
        for i in (0..group.len()).filter(|i| i & distance == 0) {
            let (a, b) = (group[i], group[i + distance]);
            (group[i], group[i + distance]) = (a + b, a - b);
        }
        distance *= 2;
    }
}
