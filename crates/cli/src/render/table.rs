//! Tables: instances, GPUs, settings. Owns their columns and how they fit the terminal.

use comfy_table::{
    Attribute, Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table, Width, presets,
};
use qudata_api::{GpuView, InstanceView};
use uuid::Uuid;

use super::{gpu, instance::state_tone, line};
use crate::{
    pick::short_id,
    screen::{Look, Tone},
    units::{age, size},
};

/// From here on there is room for ids.
const WIDE: u16 = 100;
/// Columns that may be folded; all others are as wide as their content.
const FOLDED: [&str; 3] = ["NAME", "PORTS", "INSTANCE"];
/// Room for one pair of ports, which must not be folded within.
const PAIR: u16 = 11;

/// `instance list`.
pub(crate) fn instances(look: &Look, all: &[InstanceView]) -> String {
    if all.is_empty() {
        return "there are no instances\n".to_owned();
    }
    let with_gpus = all.iter().any(|i| !i.gpus.is_empty());
    // Names are unique and serve everywhere: where there is little room, they and the ports need it more.
    let with_ids = look.width.is_none_or(|w| w >= WIDE);
    let mut header = vec!["NAME", "STATE", "SINCE", "CPUS", "MEMORY", "DISK"];
    if with_gpus {
        header.push("GPUS");
    }
    header.push("PORTS");
    if with_ids {
        header.push("ID");
    }
    let rows = all.iter().map(|i| {
        let state = cell(super::instance::state_word(i.state), state_tone(i.state));
        let mut row = vec![
            cell(&line(&i.name), Tone::Strong),
            state,
            plain(age(i.since, look.now)),
            number(i.cpus.to_string()),
            number(size(i.memory)),
            number(size(i.storage)),
        ];
        if with_gpus {
            row.push(number(i.gpus.len().to_string()));
        }
        row.push(plain(ports(i)));
        if with_ids {
            row.push(cell(&short_id(i.id, all), Tone::Faint));
        }
        row
    });
    table(look, &header, rows)
}

/// `gpu list`.
pub(crate) fn gpus(look: &Look, gpus: &[GpuView], all: &[InstanceView]) -> String {
    if gpus.is_empty() {
        return "the agent has no GPUs\n".to_owned();
    }
    let with_since = look.width.is_none_or(|w| w >= WIDE);
    let mut header = vec!["ADDRESS", "NAME", "DRIVER", "GROUP", "NUMA", "STATE"];
    if with_since {
        header.push("SINCE");
    }
    header.push("INSTANCE");
    let rows = gpus.iter().map(|view| {
        let (word, tone) = gpu::word(view);
        let number = |n: Option<u32>| number(n.map_or_else(|| "-".to_owned(), |n| n.to_string()));
        let owner = view.instance.map(|id| owner(id, all));
        let mut row = vec![
            cell(&line(&view.address), Tone::Strong),
            plain(gpu::name(look, view)),
            plain(view.driver.as_deref().map_or_else(|| "-".to_owned(), line)),
            number(view.iommu_group),
            number(view.numa_node),
            cell(word, tone),
        ];
        if with_since {
            row.push(plain(age(view.since, look.now)));
        }
        row.push(plain(owner.unwrap_or_default()));
        row
    });
    table(look, &header, rows)
}

/// The name of the instance with this id, or the id where nobody knows it.
fn owner(id: Uuid, all: &[InstanceView]) -> String {
    let named = all.iter().find(|i| i.id == id);
    named.map_or_else(|| id.to_string(), |i| line(&i.name))
}

fn ports(instance: &InstanceView) -> String {
    let ports: Vec<_> = sorted_ports(instance).into_iter().map(|(g, p)| format!("{g}→{p}")).collect();
    ports.join(" ")
}

/// Guest port and public port, by number: the map has them by text.
pub(crate) fn sorted_ports(instance: &InstanceView) -> Vec<(String, String)> {
    let mut ports: Vec<_> = instance.ports.iter().map(|(g, p)| (line(g), line(p))).collect();
    ports.sort_by_key(|(guest, _)| guest.parse::<u16>().unwrap_or(u16::MAX));
    ports
}

/// A table without lines: two spaces between columns, folded where the terminal is too narrow.
pub(crate) fn table(look: &Look, header: &[&str], rows: impl Iterator<Item = Vec<Cell>>) -> String {
    let mut table = Table::new();
    // Whether there is a terminal was decided once, in `screen`.
    table.load_style(presets::NOTHING).force_no_tty();
    if look.colour {
        table.enforce_styling().style_text_only();
    }
    match look.width {
        Some(width) => table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    table.set_header(header.iter().map(|h| Cell::new(h).add_attribute(Attribute::Dim)));
    table.add_rows(rows);
    for (column, name) in table.column_iter_mut().zip(header) {
        column.set_padding((0, 2));
        if *name == "PORTS" {
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(PAIR + 2)));
        } else if !FOLDED.contains(name) && look.width.is_some_and(|w| w >= 80) {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    table.lines().map(|l| format!("{}\n", l.trim_end())).collect()
}

/// A cell without a tone.
pub(crate) fn plain(text: impl Into<String>) -> Cell {
    Cell::new_owned(text.into())
}

fn number(text: String) -> Cell {
    Cell::new_owned(text).set_alignment(CellAlignment::Right)
}

fn cell(text: &str, tone: Tone) -> Cell {
    let cell = Cell::new(text);
    match tone {
        Tone::Good => cell.fg(Color::DarkGreen),
        Tone::Notice => cell.fg(Color::DarkYellow),
        Tone::Bad => cell.fg(Color::DarkRed),
        Tone::Faint => cell.add_attribute(Attribute::Dim),
        Tone::Strong => cell.add_attribute(Attribute::Bold),
        Tone::Plain => cell,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn instances_at_two_widths_and_unfolded() {
        let all = sample::instances();
        insta::assert_snapshot!("instances_80", instances(&sample::look(Some(80)), &all));
        insta::assert_snapshot!("instances_120", instances(&sample::look(Some(120)), &all));
        insta::assert_snapshot!("instances_piped", instances(&sample::look(None), &all));
    }

    #[test]
    fn nothing_is_wider_than_the_terminal() {
        let all = sample::instances();
        for width in [60, 80, 100, 120, 200] {
            for line in instances(&sample::look(Some(width)), &all).lines() {
                assert!(line.chars().count() <= usize::from(width), "{width}: {line}");
            }
            for line in gpus(&sample::look(Some(width)), &sample::gpus(), &all).lines() {
                assert!(line.chars().count() <= usize::from(width), "{width}: {line}");
            }
        }
    }

    #[test]
    fn gpus_at_two_widths_and_unfolded() {
        let all = sample::instances();
        insta::assert_snapshot!("gpus_80", gpus(&sample::look(Some(80)), &sample::gpus(), &all));
        insta::assert_snapshot!("gpus_140", gpus(&sample::look(Some(140)), &sample::gpus(), &all));
        insta::assert_snapshot!("gpus_piped", gpus(&sample::look(None), &sample::gpus(), &all));
    }

    #[test]
    fn the_owner_of_a_gpu_is_named_or_at_least_numbered() {
        let look = sample::look(None);
        let id = sample::instances()[0].id.to_string();
        assert!(gpus(&look, &sample::gpus(), &[]).contains(&id));
        assert!(!gpus(&look, &sample::gpus(), &sample::instances()).contains(&id));
    }

    #[test]
    fn empty_tables_say_so() {
        let look = sample::look(Some(80));
        assert_eq!(instances(&look, &[]), "there are no instances\n");
        assert_eq!(gpus(&look, &[], &[]), "the agent has no GPUs\n");
    }

    #[test]
    fn colours_are_used_only_where_they_may_be() {
        let all = sample::instances();
        let mut look = sample::look(Some(120));
        assert!(!instances(&look, &all).contains('\x1b'));
        look.colour = true;
        assert!(instances(&look, &all).contains("\x1b["));
    }
}
