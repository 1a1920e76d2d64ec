//! The picture: error over bits an element, a line for each code, of one quantization and of the sum.

use std::path::Path;

use anyhow::Result;

use super::Line;
use super::measure::{Loss, Row};
use crate::plot;
use crate::plot::{Axis, COLORS, Look, Mark, Panel, Picture, decades, span};

/// Draws it, with a level at the error that was asked for.
pub fn write(path: &Path, lines: &[Line], subtitle: &str, error: f64) -> Result<()> {
    let picture = Picture {
        title: "What each width and code loses".into(),
        subtitle: format!("{subtitle} Gray: an error of {error}."),
        panels: vec![
            panel("an input, quantized once", lines, |row| row.once, error),
            panel("the sum, in two hops", lines, |row| row.sum, error),
        ],
        columns: 2,
        panel_px: (560, 460),
    };
    picture.write(path)
}

fn panel(title: &str, lines: &[Line], loss: fn(&Row) -> Loss, error: f64) -> Panel {
    let mut drawn: Vec<plot::Line> = Vec::new();
    for line in lines {
        let (Some(code), Some(group), relative) = (line.code, line.group, loss(&line.row).relative_l2) else {
            continue;
        };
        if !relative.is_finite() || relative <= 0.0 {
            continue; // has no place on a logarithmic axis
        }
        let name = format!("{code}, group {group}");
        let at = drawn.iter().position(|other| other.name == name).unwrap_or_else(|| {
            let mark = [Mark::Circle, Mark::Triangle, Mark::Square, Mark::Cross][drawn.len() % 4];
            let look = Look { color: COLORS[drawn.len() % COLORS.len()], mark };
            drawn.push(plot::Line { name, look, points: vec![], labels: vec![] });
            drawn.len() - 1
        });
        drawn[at].points.push((line.bits_per_element, relative));
    }
    drawn.iter_mut().for_each(|line| line.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    let points = || drawn.iter().flat_map(|line| &line.points);
    let y = Axis {
        label: "relative error (L2)".into(),
        ticks: decades(points().map(|(_, error)| *error).chain([error]), true),
        text: |error| error.to_string(),
        log: true,
    };
    let (least, most) = span(points().map(|(bits, _)| *bits));
    let (least, most) = if least.is_finite() { (least.floor() as u32, most.ceil() as u32) } else { (0, 16) };
    let x = Axis {
        label: "bits an element on the wire, scales included".into(),
        ticks: (least..=most).map(f64::from).collect(),
        text: |bits| bits.to_string(),
        log: false,
    };
    Panel { title: title.into(), x, y, level: Some(error), lines: drawn }
}
