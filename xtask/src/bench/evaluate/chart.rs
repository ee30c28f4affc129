//! The evaluation as SVG: a bar with and a bar without the neighbour for each system.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::Row;
use crate::bench::charts::{OURS, failed, sheet, text_style};

/// With the neighbour.
const NOISY: RGBColor = RGBColor(0xc2, 0x51, 0x1b);

/// A chart of one metric: medians as bars, quartiles as whiskers, on a logarithmic axis.
pub fn draw(title: &str, rows: &[&Row], foot: &[String]) -> Result<String> {
    let mut systems: Vec<&str> = Vec::new();
    for row in rows {
        if !systems.contains(&row.system.as_str()) {
            systems.push(&row.system);
        }
    }
    let values = || {
        rows.iter()
            .flat_map(|row| [row.spread.q1, row.spread.q3])
            .filter(|value| *value > 0.0)
    };
    let low = values().fold(f64::INFINITY, f64::min).min(1e9) / 3.0;
    let high = values().fold(low, f64::max) * 6.0;
    let unit = rows.first().map_or("", |row| row.unit);
    let top = 80 + 56 * systems.len() as u32;
    sheet(top + 22 * foot.len() as u32 + 10, |area| {
        let (plot, below) = area.split_vertically(top);
        let count = systems.len() as f64;
        let mut chart = ChartBuilder::on(&plot)
            .caption(
                format!("{title}: without (blue) and with (orange) a noisy neighbour"),
                ("sans-serif", 17),
            )
            .margin(10)
            .x_label_area_size(26)
            .y_label_area_size(190)
            .build_cartesian_2d((low..high).log_scale(), 0f64..count)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(failed)?;
        let (right, left) = (text_style(area, HPos::Right), text_style(area, HPos::Left));
        for (i, system) in systems.iter().enumerate() {
            let from = count - i as f64;
            let label = EmptyElement::at((low, from - 0.5)) + Text::new(system.to_string(), (-8, 0), right.clone());
            chart.draw_series([label]).map_err(failed)?;
            for row in rows.iter().filter(|row| row.system == *system) {
                let (at, color) = if row.neighbour { (0.54, NOISY) } else { (0.12, OURS) };
                let spread = &row.spread;
                let shape = Rectangle::new([(low, from - at), (spread.median, from - at - 0.34)], color.filled());
                chart.draw_series([shape]).map_err(failed)?;
                let middle = from - at - 0.17;
                let whisker = PathElement::new([(spread.q1, middle), (spread.q3, middle)], BLACK.stroke_width(1));
                chart.draw_series([whisker]).map_err(failed)?;
                let words = format!("{} {unit}", number(spread.median));
                let words =
                    EmptyElement::at((spread.median.max(spread.q3), middle)) + Text::new(words, (8, 0), left.clone());
                chart.draw_series([words]).map_err(failed)?;
            }
        }
        for (i, line) in foot.iter().enumerate() {
            let place = (20, 8 + 22 * i as i32);
            below
                .draw(&Text::new(line.clone(), place, ("sans-serif", 13)))
                .map_err(failed)?;
        }
        Ok(())
    })
}

/// Three digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
