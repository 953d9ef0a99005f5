//! `gpu topo`: how far the GPUs are from each other and where they sit. Owns the matrix and how it goes on below where
//! the terminal is too narrow for it.

use qudata_api::{GpuDistance, GpuTopology};

use super::{fold, line};
use crate::screen::{Look, Tone};

/// Between columns.
const GAP: usize = 2;
/// Letters and the gap behind them.
const LEGEND_INDENT: usize = 8;

const NAME: &str = "NAME";

struct Column {
    header: String,
    cells: Vec<String>,
}

impl Column {
    fn width(&self) -> usize {
        self.cells.iter().chain([&self.header]).map(|c| c.chars().count()).max().unwrap_or(0)
    }
}

/// The matrix with the places of the GPUs and the legend.
pub(crate) fn topology(look: &Look, topology: &GpuTopology) -> String {
    if topology.gpus.is_empty() {
        return "the agent has no GPUs\n".to_owned();
    }
    let labels: Vec<String> = (0..topology.gpus.len()).map(|i| format!("GPU{i}")).collect();
    let label_width = labels.last().map_or(0, String::len);
    let mut text = String::new();
    for block in blocks(look, label_width, &columns(topology, &labels)) {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&rendered(look, label_width, &labels, &block));
    }
    if !topology.legend.is_empty() {
        text.push_str(&format!("\n{}\n", look.paint(Tone::Faint, "LEGEND")));
    }
    for entry in &topology.legend {
        let meaning = fold(look, LEGEND_INDENT, &entry.meaning);
        text.push_str(&format!("  {:4}  {meaning}\n", letters(entry.distance)));
    }
    text
}

fn columns(topology: &GpuTopology, labels: &[String]) -> Vec<Column> {
    let distance = |row: usize, column: usize| {
        let known = topology.matrix.get(row).and_then(|r| r.get(column));
        known.map_or("?", |d| letters(*d)).to_owned()
    };
    let matrix = labels.iter().enumerate().map(|(column, label)| Column {
        header: label.clone(),
        cells: (0..labels.len()).map(|row| distance(row, column)).collect(),
    });
    let of = |header: &str, cell: fn(&qudata_api::GpuPlace) -> Option<String>| Column {
        header: header.to_owned(),
        cells: topology.gpus.iter().map(|gpu| cell(gpu).unwrap_or_else(|| "-".to_owned())).collect(),
    };
    let places = [
        of("NUMA", |gpu| gpu.numa_node.map(|n| n.to_string())),
        of("GROUP", |gpu| gpu.iommu_group.map(|n| n.to_string())),
        of("ADDRESS", |gpu| Some(line(&gpu.address))),
        of(NAME, |gpu| gpu.name.as_deref().map(line)),
    ];
    matrix.chain(places).collect()
}

/// The columns in blocks that fit the terminal one below the other. Names, which come last and stand in `gpu list` as
/// well, are left out rather than given a block of their own.
fn blocks<'a>(look: &Look, label_width: usize, columns: &'a [Column]) -> Vec<Vec<&'a Column>> {
    let room = look.width.map_or(usize::MAX, |w| usize::from(w).saturating_sub(label_width));
    let mut blocks: Vec<Vec<&Column>> = Vec::new();
    let mut used = 0;
    for column in columns {
        let width = GAP + column.width();
        match blocks.last_mut() {
            Some(block) if used + width <= room => block.push(column),
            Some(_) if column.header == NAME => break,
            _ => {
                blocks.push(vec![column]);
                used = 0;
            }
        }
        used += width;
    }
    blocks
}

fn rendered(look: &Look, label_width: usize, labels: &[String], block: &[&Column]) -> String {
    let row = |label: &str, cell: &dyn Fn(&Column) -> String| {
        let mut text = format!("{label:label_width$}");
        for column in block {
            text.push_str(&format!("{:GAP$}{:width$}", "", cell(column), width = column.width()));
        }
        text.trim_end().to_owned()
    };
    let mut text = look.paint(Tone::Faint, &row("", &|column| column.header.clone()));
    text.push('\n');
    for (i, label) in labels.iter().enumerate() {
        text.push_str(&row(label, &|column| column.cells.get(i).cloned().unwrap_or_default()));
        text.push('\n');
    }
    text
}

fn letters(distance: GpuDistance) -> &'static str {
    match distance {
        GpuDistance::X => "X",
        GpuDistance::Pix => "PIX",
        GpuDistance::Pxb => "PXB",
        GpuDistance::Phb => "PHB",
        GpuDistance::Node => "NODE",
        GpuDistance::Sys => "SYS",
    }
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn eight_gpus_at_two_widths_and_piped() {
        let eight = sample::topology(8);
        insta::assert_snapshot!("topo_80", topology(&sample::look(Some(80)), &eight));
        insta::assert_snapshot!("topo_140", topology(&sample::look(Some(140)), &eight));
        insta::assert_snapshot!("topo_piped", topology(&sample::look(None), &eight));
    }

    #[test]
    fn sixteen_gpus_go_on_below() {
        insta::assert_snapshot!("topo_16_at_80", topology(&sample::look(Some(80)), &sample::topology(16)));
    }

    #[test]
    fn nothing_is_wider_than_the_terminal_and_no_distance_is_lost() {
        for count in [1, 2, 8, 16] {
            let given = sample::topology(count);
            for width in [40, 60, 80, 100, 140, 200] {
                let text = topology(&sample::look(Some(width)), &given);
                for line in text.lines() {
                    assert!(line.chars().count() <= usize::from(width), "{count} {width}: {line}");
                }
                for gpu in &given.gpus {
                    assert!(text.contains(&gpu.address), "{count} {width}: {}", gpu.address);
                }
                let last = format!("GPU{}", count - 1);
                assert!(text.lines().any(|l| !l.starts_with("GPU") && l.contains(&last)), "{text}");
            }
        }
    }

    #[test]
    fn a_matrix_with_holes_is_shown_with_holes() {
        let mut holes = sample::topology(2);
        holes.matrix.pop();
        holes.legend.clear();
        holes.gpus[0].numa_node = None;
        let text = topology(&sample::look(None), &holes);
        let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(rows[1][..4], ["GPU0", "X", "PIX", "-"]);
        assert_eq!(rows[2][..3], ["GPU1", "?", "?"]);
        assert_eq!(topology(&sample::look(None), &GpuTopology::default()), "the agent has no GPUs\n");
    }
}
