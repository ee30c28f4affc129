//! Charts of results, as SVG files in `docs/charts/`, and the links to them in `docs/performance.md`.
//!
//! They are drawn from the JSON that a run wrote, so that a chart can be redrawn without measuring.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Deserialize;

use super::report::SCHEMA;
use super::stats::Spread;

const WIDTH: u32 = 960;
pub(super) const OURS: RGBColor = RGBColor(0x1b, 0x6e, 0xc2);
const PEER: RGBColor = RGBColor(0x9a, 0x9a, 0x9a);
const LINES: [RGBColor; 4] = [
    RGBColor(0x1b, 0x6e, 0xc2),
    RGBColor(0x7a, 0xb3, 0xea),
    RGBColor(0xc2, 0x51, 0x1b),
    RGBColor(0xea, 0xa8, 0x7a),
];

/// Where the links stand in the document.
const BEGIN: &str = "<!-- charts: written by cargo xtask bench --charts -->";
const END: &str = "<!-- end of charts -->";

/// What a chart needs of a file.
#[derive(Deserialize)]
struct File {
    schema: String,
    quick: bool,
    rows: Vec<Row>,
    scale: Vec<Point>,
}

#[derive(Clone, Deserialize)]
struct Row {
    metric: String,
    bytes: Option<usize>,
    ours: Option<f64>,
    peer: Option<f64>,
    ratio: Option<Spread>,
    ours_name: Option<String>,
    peer_name: Option<String>,
    #[serde(default)]
    unfinished: bool,
}

#[derive(Clone, Deserialize)]
struct Point {
    factor: String,
    at: usize,
    rings: String,
    load: String,
    mpps: Option<f64>,
    front_cycles: Option<f64>,
}

/// A drawn chart.
struct Chart {
    /// The file, without `.svg`.
    name: String,
    /// What it shows, for those who do not see it.
    title: String,
    svg: String,
}

/// Draws the charts of these files; where files have the same metric, the last one's is drawn.
pub fn command(root: &Path, files: &[PathBuf]) -> Result<()> {
    let (mut rows, mut points): (Vec<Row>, Vec<Point>) = (Vec::new(), Vec::new());
    for path in files {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let file = read(&text).with_context(|| path.display().to_string())?;
        if file.quick {
            eprintln!("{}: a --quick run, whose numbers say nothing", path.display());
        }
        for row in file.rows {
            if row.unfinished {
                eprintln!("{}: not all launches of {} were made", path.display(), row.metric);
            }
            rows.retain(|r| (&r.metric, r.bytes) != (&row.metric, row.bytes));
            rows.push(row);
        }
        if !file.scale.is_empty() {
            points = file.scale;
        }
    }
    let charts = draw(&rows, &points)?;
    if charts.is_empty() {
        bail!("these files have nothing to draw");
    }
    let dir = root.join("docs/charts");
    std::fs::create_dir_all(&dir)?;
    for chart in &charts {
        let path = dir.join(format!("{}.svg", chart.name));
        std::fs::write(&path, &chart.svg).with_context(|| path.display().to_string())?;
        println!("written: {}", path.display());
    }
    let document = root.join("docs/performance.md");
    let text = std::fs::read_to_string(&document).with_context(|| document.display().to_string())?;
    std::fs::write(&document, linked(&text, &charts)).with_context(|| document.display().to_string())?;
    println!("linked in {}", document.display());
    Ok(())
}

fn read(text: &str) -> Result<File> {
    let value: serde_json::Value = serde_json::from_str(text)?;
    let schema = value.get("schema").and_then(|s| s.as_str()).unwrap_or_default();
    if schema != SCHEMA {
        bail!("its schema is {schema:?}; this program draws {SCHEMA:?}");
    }
    let file: File = serde_json::from_value(value)?;
    debug_assert_eq!(file.schema, SCHEMA);
    Ok(file)
}

/// The document with the links to these charts, in place of those that it had, or at its end.
fn linked(document: &str, charts: &[Chart]) -> String {
    let links: String = charts
        .iter()
        .map(|c| format!("\n![{}](charts/{}.svg)\n", c.title, c.name))
        .collect();
    let links = format!("{BEGIN}\n{links}\n{END}");
    match (document.find(BEGIN), document.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            format!("{}{links}{}", &document[..begin], &document[end + END.len()..])
        }
        _ => format!("{}\n\n## Charts\n\n{links}\n", document.trim_end()),
    }
}

fn draw(rows: &[Row], points: &[Point]) -> Result<Vec<Chart>> {
    let mut charts = Vec::new();
    let groups = ["virtio_user.", "both.", "direct."];
    let throughput = |r: &&Row| groups.iter().any(|g| r.metric.starts_with(g)) && r.ours.is_some();
    let mut sizes: Vec<usize> = rows.iter().filter(throughput).filter_map(|r| r.bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for bytes in sizes {
        let bars = rows.iter().filter(throughput).filter(|r| r.bytes == Some(bytes));
        charts.push(bar_chart(
            format!("throughput-{bytes}"),
            format!("Throughput at {bytes} bytes, million frames a second: ours (blue) and DPDK's (grey)"),
            &bars.collect::<Vec<_>>(),
            "Mpps",
        )?);
    }
    let instructions = |r: &&Row| r.metric.starts_with("instructions.") && r.bytes == Some(64) && r.ours.is_some();
    let counted: Vec<&Row> = rows.iter().filter(instructions).collect();
    if !counted.is_empty() {
        charts.push(bar_chart(
            "instructions".into(),
            "Instructions a packet of the front-end's burst calls: ours (blue) and DPDK's (grey)".into(),
            &counted,
            "",
        )?);
    }
    let ratios: Vec<(&Row, Spread)> = rows
        .iter()
        .filter(throughput)
        .filter_map(|r| Some((r, r.ratio?)))
        .collect();
    if !ratios.is_empty() {
        charts.push(ratio_chart(&ratios)?);
    }
    for (factor, title) in [
        ("ring", "entries of each ring"),
        ("burst", "packets of a burst"),
        ("queues", "queue pairs, one thread a side"),
        ("bytes", "bytes of a frame"),
        ("regions", "regions of memory"),
    ] {
        let of: Vec<&Point> = points.iter().filter(|p| p.factor == factor).collect();
        if of.iter().any(|p| p.mpps.is_some()) {
            charts.push(scale_chart(factor, title, &of)?);
        }
    }
    Ok(charts)
}

pub(super) fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing the chart: {error}")
}

/// Draws on a white sheet of this height.
pub(super) fn sheet(
    height: u32,
    draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<()>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        draw(&area)?;
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

pub(super) fn text_style<'a>(area: &DrawingArea<SVGBackend<'_>, Shift>, side: HPos) -> TextStyle<'a> {
    ("sans-serif", 13)
        .into_font()
        .into_text_style(area)
        .pos(Pos::new(side, VPos::Center))
}

/// Two bars a row, from zero.
fn bar_chart(name: String, title: String, rows: &[&Row], unit: &str) -> Result<Chart> {
    let most = rows
        .iter()
        .flat_map(|r| [r.ours, r.peer])
        .flatten()
        .fold(1e-9, f64::max);
    let height = 70 + 44 * rows.len() as u32;
    let svg = sheet(height, |area| {
        let count = rows.len() as f64;
        let mut chart = ChartBuilder::on(area)
            .caption(&title, ("sans-serif", 17))
            .margin(10)
            .x_label_area_size(26)
            .y_label_area_size(150)
            .build_cartesian_2d(0f64..most * 1.9, 0f64..count)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(failed)?;
        let (right, left) = (text_style(area, HPos::Right), text_style(area, HPos::Left));
        for (i, row) in rows.iter().enumerate() {
            let top = count - i as f64;
            let label = EmptyElement::at((0.0, top - 0.5)) + Text::new(row.metric.clone(), (-8, 0), right.clone());
            chart.draw_series([label]).map_err(failed)?;
            let bars = [
                (row.ours, &row.ours_name, OURS, 0.1),
                (row.peer, &row.peer_name, PEER, 0.5),
            ];
            for (value, who, color, at) in bars {
                let Some(value) = value else { continue };
                let shape = Rectangle::new([(0.0, top - at), (value, top - at - 0.36)], color.filled());
                chart.draw_series([shape]).map_err(failed)?;
                let who = who.as_deref().map_or(String::new(), |w| format!("  ({w})"));
                let words = format!("{value:.1} {unit}{who}");
                let words = EmptyElement::at((value, top - at - 0.18)) + Text::new(words, (6, 0), left.clone());
                chart.draw_series([words]).map_err(failed)?;
            }
        }
        Ok(())
    })?;
    Ok(Chart { name, title, svg })
}

/// Medians and quartiles of pairwise ratios, on a logarithmic axis around 1.
fn ratio_chart(rows: &[(&Row, Spread)]) -> Result<Chart> {
    let title = "Ours to DPDK's, pair by pair: median and quartiles".to_owned();
    let low = rows.iter().map(|r| r.1.q1).fold(1.0, f64::min) / 1.2;
    let high = rows.iter().map(|r| r.1.q3).fold(1.0, f64::max) * 1.4;
    let height = 70 + 24 * rows.len() as u32;
    let svg = sheet(height, |area| {
        let count = rows.len() as f64;
        let mut chart = ChartBuilder::on(area)
            .caption(&title, ("sans-serif", 17))
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
        let even = PathElement::new([(1.0, 0.0), (1.0, count)], BLACK.stroke_width(1));
        chart.draw_series([even]).map_err(failed)?;
        let (right, left) = (text_style(area, HPos::Right), text_style(area, HPos::Left));
        for (i, (row, spread)) in rows.iter().enumerate() {
            let y = count - i as f64 - 0.5;
            let label = format!("{} {}", row.metric, row.bytes.map_or(String::new(), |b| b.to_string()));
            let label = EmptyElement::at((low, y)) + Text::new(label, (-8, 0), right.clone());
            chart.draw_series([label]).map_err(failed)?;
            let whisker = PathElement::new([(spread.q1, y), (spread.q3, y)], OURS.stroke_width(3));
            chart.draw_series([whisker]).map_err(failed)?;
            let dot = Circle::new((spread.median, y), 5, OURS.filled());
            chart.draw_series([dot]).map_err(failed)?;
            let words = EmptyElement::at((spread.q3.max(spread.median), y))
                + Text::new(format!("{:.2}", spread.median), (10, 0), left.clone());
            chart.draw_series([words]).map_err(failed)?;
        }
        Ok(())
    })?;
    let name = "ratios".to_owned();
    Ok(Chart { name, title, svg })
}

/// Packets a second above, the front-end's cycles a packet below, over one thing that is varied.
fn scale_chart(factor: &str, what: &str, points: &[&Point]) -> Result<Chart> {
    let title = format!("Split and packed rings over {what}");
    let svg = sheet(620, |area| {
        let (above, below) = area.split_vertically(320);
        panel(&above, "million frames a second", points, |p| p.mpps)?;
        panel(&below, "front-end's cycles a packet", points, |p| p.front_cycles)
    })?;
    Ok(Chart {
        name: format!("scale-{factor}"),
        title,
        svg,
    })
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    caption: &str,
    points: &[&Point],
    value: fn(&Point) -> Option<f64>,
) -> Result<()> {
    let most = points.iter().filter_map(|p| value(p)).fold(1e-9, f64::max);
    let first = points.iter().map(|p| p.at).min().unwrap_or(1).max(1) as f64;
    let last = points.iter().map(|p| p.at).max().unwrap_or(1) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(24)
        .y_label_area_size(56)
        .build_cartesian_2d((first * 0.9..last * 1.1).log_scale().base(2.0), 0f64..most * 1.15)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()
        .map_err(failed)?;
    let mut lines: Vec<(&str, &str)> = points.iter().map(|p| (&*p.rings, &*p.load)).collect();
    lines.sort_unstable();
    lines.dedup();
    for (line, color) in lines.into_iter().zip(LINES) {
        let mut of: Vec<(f64, f64)> = points
            .iter()
            .filter(|p| (&*p.rings, &*p.load) == line)
            .filter_map(|p| Some((p.at as f64, value(p)?)))
            .collect();
        of.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart
            .draw_series(LineSeries::new(of, color.stroke_width(2)).point_size(3))
            .map_err(failed)?
            .label(format!("{}, {}", line.0, line.1))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .draw()
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(metric: &str, ours: f64, peer: f64) -> Row {
        Row {
            metric: metric.into(),
            bytes: Some(64),
            ours: Some(ours),
            peer: Some(peer),
            ratio: Some(Spread::of(&[ours / peer])),
            ours_name: Some("packed".into()),
            peer_name: None,
            unfinished: false,
        }
    }

    #[test]
    fn every_number_is_drawn() {
        let points: Vec<Point> = [(64, 10.0), (128, 20.0)]
            .map(|(at, mpps)| Point {
                factor: "ring".into(),
                at,
                rings: "split".into(),
                load: "tx".into(),
                mpps: Some(mpps),
                front_cycles: None,
            })
            .to_vec();
        let charts = draw(&[row("both.tx", 33.3, 11.1), row("kernel.udp.tx", 1.0, 1.0)], &points).unwrap();
        let names: Vec<&str> = charts.iter().map(|c| &*c.name).collect();
        assert_eq!(names, ["throughput-64", "ratios", "scale-ring"]);
        let has = |i: usize, text: &str| assert!(charts[i].svg.contains(text), "{}: {text}", charts[i].name);
        has(0, "33.3 Mpps");
        has(0, "(packed)");
        has(0, "11.1 Mpps");
        has(1, "3.00");
        has(2, "split, tx");
        assert!(!charts[0].svg.contains("kernel"));
    }

    #[test]
    fn links_are_replaced_and_nothing_else() {
        let chart = |name: &str| Chart {
            name: name.into(),
            title: format!("Of {name}"),
            svg: String::new(),
        };
        let first = linked("# Title\n\ntext\n", &[chart("a")]);
        assert!(first.starts_with("# Title\n\ntext\n\n## Charts\n") && first.contains("![Of a](charts/a.svg)"));
        let behind = first.clone() + "\nbehind\n";
        let second = linked(&behind, &[chart("b")]);
        assert!(second.contains("![Of b](charts/b.svg)") && !second.contains("a.svg"));
        assert_eq!(
            second,
            first.replace("Of a", "Of b").replace("a.svg", "b.svg") + "\nbehind\n"
        );
    }

    #[test]
    fn another_schema_is_refused() {
        let error = read(r#"{"schema":"usernic.bench/1","rows":[]}"#)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("usernic.bench/1"), "{error}");
    }
}
