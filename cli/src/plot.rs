//! Charts as SVG: panels of lines over logarithmic or linear axes, with one legend above all of them.
//!
//! Colors are those of Okabe and Ito, which color-blind readers tell apart; lines also differ in their marks.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;

/// A whole picture.
pub struct Picture {
    /// Headline.
    pub title: String,
    /// What was measured on, and the like.
    pub subtitle: String,
    /// Row by row, `columns` in each.
    pub panels: Vec<Panel>,
    /// Panels in a row.
    pub columns: usize,
    /// Width and height of a panel, pixels.
    pub panel_px: (u32, u32),
}

/// One pair of axes.
pub struct Panel {
    /// Above it.
    pub title: String,
    /// From left to right.
    pub x: Axis,
    /// From bottom to top.
    pub y: Axis,
    /// A level of y to compare with.
    pub level: Option<f64>,
    /// What is drawn.
    pub lines: Vec<Line>,
}

/// An axis.
pub struct Axis {
    /// What it tells.
    pub label: String,
    /// Where there are grid lines and labels.
    pub ticks: Vec<f64>,
    /// How a tick is written.
    pub text: fn(f64) -> String,
    /// Whether equal ratios are equally far apart.
    pub log: bool,
}

/// A line with a mark at each point.
#[derive(Clone)]
pub struct Line {
    /// For the legend; lines of one name look alike in all panels.
    pub name: String,
    /// Its look.
    pub look: Look,
    /// The points, from left to right.
    pub points: Vec<(f64, f64)>,
    /// What stands beside each point; empty: nothing.
    pub labels: Vec<String>,
}

/// How a line looks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Its color.
    pub color: RGBColor,
    /// Its marks.
    pub mark: Mark,
}

/// The marks of a line.
#[derive(Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "they say it")]
pub enum Mark {
    Circle,
    Triangle,
    Square,
    Cross,
}

/// For what all others are compared with.
pub const BLACK: RGBColor = RGBColor(0, 0, 0);
/// Blue, vermilion, green, purple, orange, sky blue, gray: as many as there are widths.
pub const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(130, 130, 130),
];

const GRAY: RGBColor = RGBColor(90, 90, 90);
const GRID: RGBColor = RGBColor(222, 222, 222);
const TITLE_PX: u32 = 62;
const LEGEND_ROW_PX: u32 = 24;
const FONT: &str = "sans-serif";

/// Ticks at 1, 2 and 5 times the powers of ten that span the values (`fine`), or at the powers alone.
pub fn decades(values: impl Iterator<Item = f64>, fine: bool) -> Vec<f64> {
    let (min, max) = span(values);
    let steps: &[f64] = if fine { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let powers = (min.log10().floor() as i32)..=(max.log10().ceil() as i32);
    let all: Vec<f64> = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power))).collect();
    // The last one below and the first one above, and what lies between.
    let first = all.iter().rposition(|tick| *tick <= min * 1.0001).unwrap_or(0);
    let last = all.iter().position(|tick| *tick >= max * 0.9999).unwrap_or(all.len() - 1);
    all[first..=last.max(first)].to_vec()
}

/// The smallest and the largest.
pub fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(min, max), value| (value.min(min), value.max(max)))
}

impl Picture {
    /// Writes it.
    pub fn write(&self, path: &Path) -> Result<()> {
        check_name(path)?;
        ensure!(!self.panels.is_empty(), "there is nothing to plot");
        let mut text = String::new();
        self.draw(&mut text).map_err(|error| anyhow::anyhow!("{error}")).context("cannot draw")?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn draw<'a>(&self, text: &'a mut String) -> Drawn<'a> {
        let mut legend: Vec<(&str, Look)> = Vec::new();
        for line in self.panels.iter().flat_map(|panel| &panel.lines) {
            if !legend.iter().any(|(name, _)| *name == line.name) {
                legend.push((&line.name, line.look));
            }
        }
        let width = self.panel_px.0 * self.columns as u32;
        let entry_px = 60 + 7 * legend.iter().map(|(name, _)| name.len()).max().unwrap_or(0) as u32;
        let per_row = ((width - 20) / entry_px).max(1) as usize;
        let top = TITLE_PX + LEGEND_ROW_PX * legend.len().div_ceil(per_row) as u32 + 6;
        let rows = self.panels.len().div_ceil(self.columns);
        let root = SVGBackend::with_string(text, (width, top + self.panel_px.1 * rows as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(self.title.as_str(), (16, 14), (FONT, 20).into_font().style(FontStyle::Bold)))?;
        root.draw(&Text::new(self.subtitle.as_str(), (16, 40), (FONT, 13).into_font().color(&GRAY)))?;
        for (i, (name, look)) in legend.iter().enumerate() {
            let (column, row) = ((i % per_row) as u32, (i / per_row) as u32);
            let (x, y) = ((20 + column * entry_px) as i32, (TITLE_PX + row * LEGEND_ROW_PX + 12) as i32);
            root.draw(&PathElement::new(vec![(x, y), (x + 30, y)], look.color.stroke_width(2)))?;
            look.draw(&root, (x + 15, y))?;
            root.draw(&Text::new(*name, (x + 38, y - 7), (FONT, 14).into_font()))?;
        }
        let (_, below) = root.split_vertically(top);
        for (panel, area) in self.panels.iter().zip(below.split_evenly((rows, self.columns))) {
            panel.draw(&area)?;
        }
        root.present()?;
        Ok(())
    }
}

/// SVG is what is written.
pub fn check_name(path: &Path) -> Result<()> {
    let is_svg = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
    ensure!(is_svg, "a plot is an SVG; name it so, for example {}", path.with_extension("svg").display());
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<'a> = Result<(), Box<dyn std::error::Error + 'a>>;

impl Look {
    fn draw<'a>(&self, area: &Area<'a>, at: (i32, i32)) -> Drawn<'a> {
        let style = self.color.filled();
        match self.mark {
            Mark::Circle => area.draw(&Circle::new(at, 4, style))?,
            Mark::Triangle => area.draw(&TriangleMarker::new(at, 6, style))?,
            Mark::Square => area.draw(&Rectangle::new([(at.0 - 4, at.1 - 4), (at.0 + 4, at.1 + 4)], style))?,
            Mark::Cross => area.draw(&Cross::new(at, 4, self.color.stroke_width(2)))?,
        }
        Ok(())
    }
}

/// Where the values of an axis lie.
struct Scale {
    /// The ends, in [`Scale::place`]'s measure.
    ends: (f64, f64),
    ticks: Vec<f64>,
    log: bool,
}

impl Axis {
    /// From the first tick to the last, with a part of `air` at both ends for what lies on them.
    fn scale(&self, air: f64) -> Scale {
        let mut scale = Scale { ends: (0.0, 1.0), ticks: self.ticks.clone(), log: self.log };
        let places = || self.ticks.iter().map(|tick| scale.place(*tick));
        let (min, max) = (places().fold(f64::INFINITY, f64::min), places().fold(f64::NEG_INFINITY, f64::max));
        let air = (max - min).max(0.1) * air;
        scale.ends = (min - air, max + air);
        scale
    }
}

impl Scale {
    fn place(&self, value: f64) -> f64 {
        if self.log { value.ln() } else { value }
    }

    fn value(&self, place: f64) -> f64 {
        if self.log { place.exp() } else { place }
    }
}

impl Ranged for Scale {
    type ValueType = f64;
    type FormatOption = DefaultFormatting;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let part = (self.place(*value) - self.ends.0) / (self.ends.1 - self.ends.0);
        limit.0 + (part * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<H: KeyPointHint>(&self, hint: H) -> Vec<f64> {
        if hint.weight().allow_light_points() { vec![] } else { self.ticks.clone() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.value(self.ends.0)..self.value(self.ends.1)
    }
}

impl Panel {
    fn draw<'a>(&self, area: &Area<'a>) -> Drawn<'a> {
        let (x, y) = (self.x.scale(0.04), self.y.scale(0.03));
        let ends = x.range();
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, (FONT, 15))
            .margin(10)
            .margin_right(22)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .x_desc(self.x.label.as_str())
            .y_desc(self.y.label.as_str())
            .x_label_formatter(&|value| (self.x.text)(*value))
            .y_label_formatter(&|value| (self.y.text)(*value))
            .x_labels(self.x.ticks.len())
            .y_labels(self.y.ticks.len())
            .bold_line_style(GRID)
            .axis_style(GRAY)
            .label_style((FONT, 12))
            .axis_desc_style((FONT, 13))
            .draw()?;
        if let Some(level) = self.level {
            chart.draw_series(LineSeries::new([(ends.start, level), (ends.end, level)], GRAY.stroke_width(1)))?;
        }
        for Line { look, points, labels, .. } in &self.lines {
            chart.draw_series(LineSeries::new(points.iter().copied(), look.color.stroke_width(2)))?;
            for (i, point) in points.iter().enumerate() {
                // The panel begins somewhere in the picture; what is drawn in it is placed from there.
                let ((x, y), (left, top)) = (chart.backend_coord(point), area.get_base_pixel());
                look.draw(area, (x - left, y - top))?;
                if let Some(label) = labels.get(i) {
                    let style = (FONT, 13).into_font().color(&look.color);
                    area.draw(&Text::new(label.as_str(), (x - left + 9, y - top - 16), style))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_enclose_the_values() {
        assert_eq!(decades([3.0, 70.0].into_iter(), false), [1.0, 10.0, 100.0]);
        assert_eq!(decades([3.0, 45.0].into_iter(), true), [2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(decades([10.0].into_iter(), true), [10.0]);
    }

    #[test]
    fn other_formats_are_refused_with_the_name_to_give() {
        assert!(check_name(Path::new("a.svg")).is_ok() && check_name(Path::new("b.SVG")).is_ok());
        assert!(check_name(Path::new("a.png")).unwrap_err().to_string().contains("a.svg"));
    }
}
