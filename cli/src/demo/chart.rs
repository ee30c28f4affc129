//! The comparison as an SVG chart: frames a second above, round trips below, both on logarithmic axes.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::report::{Results, Row};

const WIDTH: u32 = 960;
const HEIGHT: u32 = 720;
/// Of it, for the lines below the panels.
const NOTES: u32 = 90;
const OURS: RGBColor = RGBColor(0x1b, 0x6e, 0xc2);
const KERNEL: RGBColor = RGBColor(0x9a, 0x9a, 0x9a);

/// A bar: its label, its value as a number and in words, and whose it is.
struct Bar {
    label: String,
    value: f64,
    words: String,
    ours: bool,
}

/// Draws the chart; the SVG text.
pub fn draw(results: &Results) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let (panels, notes) = area.split_vertically(HEIGHT - NOTES);
        let (above, below) = panels.split_vertically((HEIGHT - NOTES) / 2);
        let frames = results.rows.iter().flat_map(|row| {
            let bar = |size: &str, spread: Option<super::report::Spread>| {
                spread.map(|s| Bar {
                    label: format!("{}, {size}", row.name),
                    value: s.median / 1e6,
                    words: format!("{:.2} Mpps", s.median / 1e6),
                    ours: row.ours,
                })
            };
            [bar("64 B", row.pps_64), bar("1514 B", row.pps_1514)]
                .into_iter()
                .flatten()
        });
        panel(
            &above,
            "Throughput, million frames a second, logarithmic (more is better)",
            frames.collect(),
        )?;
        let times = results.rows.iter().flat_map(|row: &Row| {
            let bar = |name: &str, spread: Option<super::report::Spread>| {
                spread.map(|s| Bar {
                    label: format!("{}, {name}", row.name),
                    value: s.median / 1e3,
                    words: format!("{:.2} us", s.median / 1e3),
                    ours: row.ours,
                })
            };
            [bar("p50", row.p50_ns), bar("p99", row.p99_ns)].into_iter().flatten()
        });
        panel(
            &below,
            "Round trip of one frame of 64 bytes, microseconds, logarithmic (less is better)",
            times.collect(),
        )?;
        for (i, line) in lines(results).into_iter().enumerate() {
            let at = (24, 4 + 20 * i as i32);
            notes.draw(&Text::new(line, at, ("sans-serif", 14))).map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

/// What has to be known to read the chart: the conclusion, the loss, and what it was measured on.
fn lines(results: &Results) -> Vec<String> {
    let lost = results
        .rows
        .iter()
        .filter_map(|row| Some(format!("{}: {}", row.name, row.lost()?)));
    let mut lost = lost.collect::<Vec<_>>().join(", ");
    lost = if lost.is_empty() {
        String::new()
    } else {
        format!("Frames lost: {lost}. ")
    };
    if let Some(missing) = &results.missing {
        lost.push_str(&format!("Not measured: {missing}"));
    }
    let on = format!(
        "usernic {}, {}, Linux {}, {}",
        results.version, results.cpu, results.kernel, results.date
    );
    [results.conclusion(), lost, results.method(), on]
        .into_iter()
        .filter(|line| !line.is_empty())
        .collect()
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing the chart: {error}")
}

fn panel(area: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, bars: Vec<Bar>) -> Result<()> {
    let values = || bars.iter().map(|b| b.value).filter(|v| *v > 0.0);
    if values().next().is_none() {
        return Ok(());
    }
    // Whole decades around all values, with room for the words behind the longest bar.
    let low = 10f64.powf(values().fold(f64::INFINITY, f64::min).log10().floor());
    let high = 10f64.powf(values().fold(0.0, f64::max).log10().ceil()).max(low * 10.0) * 4.0;
    let count = bars.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(250)
        .build_cartesian_2d((low..high).log_scale(), 0f64..count)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(failed)?;
    let right = ("sans-serif", 14)
        .into_font()
        .into_text_style(area)
        .pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Right,
            plotters::style::text_anchor::VPos::Center,
        ));
    let left = ("sans-serif", 14)
        .into_font()
        .into_text_style(area)
        .pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Left,
            plotters::style::text_anchor::VPos::Center,
        ));
    for (i, bar) in bars.iter().enumerate() {
        let top = count - i as f64;
        let color = if bar.ours { OURS } else { KERNEL };
        let value = bar.value.max(low);
        let shape = Rectangle::new([(low, top - 0.15), (value, top - 0.85)], color.filled());
        chart.draw_series([shape]).map_err(failed)?;
        let label = EmptyElement::at((low, top - 0.5)) + Text::new(bar.label.clone(), (-8, 0), right.clone());
        chart.draw_series([label]).map_err(failed)?;
        let words = EmptyElement::at((value, top - 0.5)) + Text::new(bar.words.clone(), (6, 0), left.clone());
        chart.draw_series([words]).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chart_has_every_bar_and_its_words() {
        let svg = draw(&super::super::report::tests::example()).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for text in [
            "Throughput",
            "Round trip",
            "usernic, 64 B",
            "8.00 Mpps",
            "veth, UDP, blocking, p99",
            "51.00 us",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        assert_eq!(svg.matches("#1B6EC2").count(), 4, "two bars of ours in each panel");
    }

    #[test]
    fn the_chart_says_what_the_table_says() {
        let mut results = super::super::report::tests::example();
        results.rows[0].lost = 7;
        let svg = draw(&results).unwrap();
        for text in [
            "logarithmic",
            "times the frames",
            "usernic: 7",
            "1970-01-01 00:00 UTC",
            "Made-up CPU &amp; more",
            "usernic 0, ",
            "Linux 6",
            "two cores",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        results.waited = Some(0.3);
        let busy = draw(&results).unwrap();
        assert!(busy.contains("No comparison: the machine is busy") && !busy.contains("times the frames"));
    }

    #[test]
    fn no_rows_draw_an_empty_chart() {
        let mut results = super::super::report::tests::example();
        results.rows.clear();
        assert!(draw(&results).unwrap().contains("<svg"));
    }
}
