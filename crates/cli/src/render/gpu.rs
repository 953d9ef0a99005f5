//! One GPU: `gpu show`, its name and the word for its state everywhere, and what is wrong with GPUs.

use qudata_api::{GpuHolder, GpuHolderKind, GpuLink, GpuState, GpuView, Problem};

use super::{fields, fold, folded, instance::since, line};
use crate::{
    screen::{Look, Tone},
    units::{ago, size},
};

/// Column at which values begin in [`show`]; what is longer than the terminal is folded there.
const INDENT: usize = 11;
/// From here on there is room for whole names.
const WIDE: u16 = 100;

/// `gpu show`; `owner` is the name of its instance.
pub(crate) fn show(look: &Look, gpu: &GpuView, owner: Option<&str>) -> String {
    let mut rows = vec![("address", look.paint(Tone::Strong, &line(&gpu.address)))];
    if let Some(name) = identity(gpu) {
        rows.push(("name", name));
    }
    rows.push(("state", state(look, gpu)));
    match (owner, gpu.instance) {
        (Some(name), Some(id)) => rows.push(("instance", format!("{} ({id})", line(name)))),
        (None, Some(id)) => rows.push(("instance", id.to_string())),
        (_, None) => {}
    }
    let number = |n: Option<u32>| n.map_or_else(|| "none".to_owned(), |n| n.to_string());
    let listed = |list: &[String]| match list {
        [] => "none".to_owned(),
        list => line(&list.join(", ")),
    };
    rows.push(("driver", driver(gpu)));
    rows.push(("functions", listed(&gpu.functions)));
    rows.push(("group", number(gpu.iommu_group)));
    rows.push(("NUMA", number(gpu.numa_node)));
    rows.push(("link", gpu.link.as_ref().map_or_else(|| "none".to_owned(), |l| link(look, l))));
    rows.push(("BARs", size(gpu.bar_bytes)));
    rows.push(("reset", listed(&gpu.reset_methods)));
    rows.push(("held by", holders(gpu)));
    let rows: Vec<_> = rows.into_iter().map(|(label, value)| (label, folded_lines(look, &value))).collect();
    let mut text = fields(look, &rows);
    let (wrong, left_out) = (problems([gpu]), notes(look, [gpu]));
    if !(wrong.is_empty() && left_out.is_empty()) {
        text.push('\n');
    }
    text.push_str(&super::status::problems(look, wrong.iter().map(|p| (None, p))));
    text.push_str(&left_out);
    text
}

/// Every line of a value within the terminal. Colours stand only in lines that are short.
fn folded_lines(look: &Look, value: &str) -> String {
    let room = look.width.map_or(usize::MAX, |w| usize::from(w).saturating_sub(INDENT));
    let fold_one = |l: &str| match l.contains('\x1b') || l.chars().count() <= room {
        true => l.to_owned(),
        false => folded(look, INDENT, l).join("\n"),
    };
    value.lines().map(fold_one).collect::<Vec<_>>().join("\n")
}

fn identity(gpu: &GpuView) -> Option<String> {
    let ids = gpu.vendor_id.as_ref().zip(gpu.device_id.as_ref()).map(|(v, d)| line(&format!("{v}:{d}")));
    match (gpu.name.as_deref().map(line), ids) {
        (Some(name), Some(ids)) => Some(format!("{name} ({ids})")),
        (name, ids) => name.or(ids),
    }
}

fn state(look: &Look, gpu: &GpuView) -> String {
    let (word, tone) = state_word(gpu.state);
    let mut text = format!("{} {}", look.paint(tone, word), since(look, gpu.since));
    match &gpu.refusal {
        Some(refusal) if refusal.by_choice => text.push_str("; left out, see below"),
        Some(_) => text.push_str("; cannot be rented, see below"),
        None if gpu.why.is_some() => text.push_str(", see below"),
        None => {}
    }
    text
}

fn driver(gpu: &GpuView) -> String {
    let now = gpu.driver.as_deref().unwrap_or("none");
    match gpu.original_driver.as_deref() {
        Some(before) if before != now => line(&format!("{now}, {before} before")),
        _ => line(now),
    }
}

fn link(look: &Look, link: &GpuLink) -> String {
    let &GpuLink { speed, width, max_speed, max_width } = link;
    // An idle GPU lowers its speed; lanes that are missing stay missing.
    let lanes = match width < max_width {
        true => look.paint(Tone::Notice, &format!("{width} of {max_width} lanes")),
        false => format!("{width} lanes"),
    };
    let slower = speed + 0.01 < max_speed;
    if slower { format!("{lanes}, {speed} of {max_speed} GT/s") } else { format!("{lanes}, {speed} GT/s") }
}

fn holders(gpu: &GpuView) -> String {
    let holder = |h: &GpuHolder| {
        let kind = match h.kind {
            GpuHolderKind::Process => "process",
            GpuHolderKind::Framebuffer => "framebuffer",
            GpuHolderKind::Console => "console",
            GpuHolderKind::Module => "kernel module",
        };
        let pid = h.pid.map(|pid| format!("pid {pid}"));
        let more: Vec<String> = pid.into_iter().chain(h.unit.clone()).collect();
        let more = if more.is_empty() { String::new() } else { format!(" ({})", more.join(", ")) };
        line(&format!("{kind} {}{more}", h.name))
    };
    match gpu.holders.as_slice() {
        [] => "nobody".to_owned(),
        all => all.iter().map(holder).collect::<Vec<_>>().join("\n"),
    }
}

/// The name as there is room for it: in full, or the part in brackets, which people know. The address of a GPU that
/// has no name is all there is.
pub(crate) fn name(look: &Look, gpu: &GpuView) -> String {
    match look.width {
        Some(width) if width < WIDE => short_name(gpu),
        _ => gpu.name.as_deref().map(line).or_else(|| identity(gpu)).unwrap_or_else(|| "-".to_owned()),
    }
}

/// `H100 SXM5 80GB` of `NVIDIA Corporation GH100 [H100 SXM5 80GB]`.
pub(crate) fn short_name(gpu: &GpuView) -> String {
    let Some(name) = &gpu.name else { return identity(gpu).unwrap_or_else(|| "-".to_owned()) };
    let bracketed =
        name.trim_end().strip_suffix(']').and_then(|n| n.rsplit_once('[')).map(|(_, inner)| inner);
    line(bracketed.filter(|inner| !inner.trim().is_empty()).unwrap_or(name))
}

/// How a GPU is called in a question: `0000:65:00.0 (H100 SXM5 80GB, in use for 1 d by training)`.
pub(crate) fn title(look: &Look, gpu: &GpuView, owner: Option<&str>) -> String {
    let by = owner.map_or_else(String::new, |name| format!(" by {}", line(name)));
    let state = format!("{} {}{by}", state_word(gpu.state).0, since(look, gpu.since));
    format!("{} ({}, {state})", line(&gpu.address), short_name(gpu))
}

/// Word and tone for a state alone.
pub(crate) fn state_word(state: GpuState) -> (&'static str, Tone) {
    match state {
        GpuState::Free => ("free", Tone::Good),
        GpuState::Leased => ("leased", Tone::Notice),
        GpuState::Bound => ("bound", Tone::Notice),
        GpuState::InUse => ("in use", Tone::Good),
        GpuState::Draining => ("draining", Tone::Notice),
        GpuState::Sanitizing => ("sanitizing", Tone::Notice),
        GpuState::Quarantined => ("quarantined", Tone::Bad),
    }
}

/// All that [`word`] may say, in the order of a GPU's life.
pub(crate) const WORDS: [&str; 9] =
    ["free", "leased", "bound", "in use", "draining", "sanitizing", "quarantined", REFUSED, LEFT_OUT];
/// The host is not in order.
const REFUSED: &str = "refused";
/// Nothing is wrong.
const LEFT_OUT: &str = "left out";

/// Word and tone for a GPU: one that cannot be rented is not called free.
pub(crate) fn word(gpu: &GpuView) -> (&'static str, Tone) {
    match (&gpu.refusal, gpu.state) {
        (Some(refusal), GpuState::Free) if refusal.by_choice => (LEFT_OUT, Tone::Faint),
        (Some(_), GpuState::Free) => (REFUSED, Tone::Bad),
        (_, state) => state_word(state),
    }
}

/// What is wrong with GPUs, each with what to do; the same obstacle of several is said once.
pub(crate) fn problems<'a>(gpus: impl IntoIterator<Item = &'a GpuView>) -> Vec<Problem> {
    let mut found: Vec<(Vec<&str>, Problem)> = Vec::new();
    for gpu in gpus {
        let Some(problem) = problem(gpu) else { continue };
        let same = |p: &Problem| {
            (&p.code, &p.message, &p.remedy) == (&problem.code, &problem.message, &problem.remedy)
        };
        match found.iter_mut().find(|(_, p)| same(p)) {
            Some((addresses, first)) => {
                addresses.push(&gpu.address);
                first.since = first.since.min(problem.since);
            }
            None => found.push((vec![&gpu.address], problem)),
        }
    }
    found.into_iter().map(|(addresses, p)| Problem { message: named(&addresses, &p.message), ..p }).collect()
}

/// The sentence with the GPUs it is about, unless it names them itself.
fn named(addresses: &[&str], sentence: &str) -> String {
    match addresses {
        [one] if sentence.contains(one) => sentence.to_owned(),
        [one] => format!("GPU {one}: {sentence}"),
        several => format!("GPUs {}: {sentence}", several.join(", ")),
    }
}

fn problem(gpu: &GpuView) -> Option<Problem> {
    let release = format!("`qudata-agent gpu release {}`", gpu.address);
    let (code, what, next) = match (&gpu.why, gpu.state) {
        (_, GpuState::Quarantined) => (
            "gpu_quarantined",
            "quarantined",
            format!("see to the cause, then {release}: it is reset and checked, and free if it passes"),
        ),
        (Some(_), _) => (
            "gpu_fault",
            "under suspicion",
            format!("its instance keeps it; after that it is quarantined until {release}"),
        ),
        (None, _) => return refused(gpu),
    };
    let why = gpu.why.as_deref().unwrap_or("it was not proven healthy and clean");
    Some(Problem {
        code: code.to_owned(),
        message: format!("GPU {} is {what}: {why}", gpu.address),
        remedy: gpu.remedy.clone().unwrap_or(next),
        since: gpu.since,
    })
}

fn refused(gpu: &GpuView) -> Option<Problem> {
    let refusal = gpu.refusal.as_ref().filter(|r| !r.by_choice)?;
    Some(Problem {
        code: refusal.code.clone(),
        message: refusal.message.clone(),
        remedy: refusal.remedy.clone(),
        since: refusal.since,
    })
}

/// GPUs that are left out by choice, and how that is changed. Nothing is wrong with them.
pub(crate) fn notes<'a>(look: &Look, gpus: impl IntoIterator<Item = &'a GpuView>) -> String {
    let mut text = String::new();
    for gpu in gpus {
        let Some(refusal) = gpu.refusal.as_ref().filter(|r| r.by_choice) else { continue };
        let sentence = named(&[&gpu.address], &refusal.message);
        let sentence = format!("{sentence} ({}, {})", refusal.code, ago(refusal.since, look.now));
        text.push_str(&format!("{} {}\n", look.paint(Tone::Faint, "○"), fold(look, 2, &sentence)));
        text.push_str(&format!("  → {}\n", fold(look, 4, &refusal.remedy)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn each_kind_of_gpu() {
        for width in [80, 140] {
            let look = sample::look(Some(width));
            let shown = |i: usize, owner| show(&look, &sample::gpus()[i], owner);
            insta::assert_snapshot!(format!("show_in_use_{width}"), shown(0, Some("training")));
            insta::assert_snapshot!(format!("show_quarantined_{width}"), shown(3, None));
            insta::assert_snapshot!(format!("show_refused_{width}"), shown(4, None));
            insta::assert_snapshot!(format!("show_left_out_{width}"), shown(5, None));
            insta::assert_snapshot!(format!("show_missing_{width}"), shown(6, None));
        }
    }

    #[test]
    fn names_are_shortened_to_what_people_know() {
        let mut gpu = sample::gpus().remove(0);
        let table = [
            (Some("NVIDIA Corporation GH100 [H100 SXM5 80GB]"), "H100 SXM5 80GB"),
            (
                Some("AMD Navi 21 [Radeon RX 6800/6800 XT / 6900 XT] (rev c1)"),
                "AMD Navi 21 [Radeon RX 6800/6800 XT / 6900 XT] (rev c1)",
            ),
            (Some("Virtio 1.0 GPU"), "Virtio 1.0 GPU"),
            (Some("Odd []"), "Odd []"),
            (Some("Odd ]"), "Odd ]"),
            (None, "10de:2330"),
        ];
        for (full, short) in table {
            gpu.name = full.map(ToOwned::to_owned);
            assert_eq!(short_name(&gpu), short);
        }
        gpu.vendor_id = None;
        assert_eq!((short_name(&gpu), name(&sample::look(None), &gpu)), ("-".to_owned(), "-".to_owned()));
    }

    #[test]
    fn an_obstacle_of_the_whole_host_is_said_once() {
        let mut gpus = sample::gpus();
        gpus.retain(|gpu| gpu.refusal.as_ref().is_some_and(|r| r.code == "foreign_device"));
        let mut other = gpus[0].clone();
        other.address = "0000:b6:00.0".to_owned();
        for gpu in [&mut gpus[0], &mut other] {
            gpu.refusal.as_mut().unwrap().message = "interrupts are not remapped".to_owned();
        }
        other.refusal.as_mut().unwrap().since = sample::at("2026-01-02T09:00:00Z");
        gpus.push(other);
        let found = problems(&gpus);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].message, "GPUs 0000:b5:00.0, 0000:b6:00.0: interrupts are not remapped");
        assert_eq!(found[0].since, sample::at("2026-01-02T09:00:00Z"), "since the first of them");
    }

    #[test]
    fn a_quarantine_without_a_remedy_says_what_to_do_nevertheless() {
        let mut gpu = sample::gpus().remove(3);
        (gpu.why, gpu.remedy) = (None, None);
        let found = problems([&gpu]);
        assert!(found[0].remedy.contains("gpu release 0000:b4:00.0"), "{found:?}");
    }

    #[test]
    fn a_gpu_under_suspicion_is_told_while_its_instance_has_it() {
        let mut gpu = sample::gpus().remove(0);
        assert!(problems([&gpu]).is_empty());
        gpu.why = Some("it fell off the bus".to_owned());
        let found = problems([&gpu]);
        assert_eq!(found[0].message, "GPU 0000:65:00.0 is under suspicion: it fell off the bus");
        assert!(found[0].code == "gpu_fault" && found[0].remedy.contains("gpu release"), "{found:?}");
        let text = show(&sample::look(Some(80)), &gpu, Some("training"));
        assert!(text.contains("in use for 1 d, see below") && text.contains("fell off the bus"), "{text}");
    }

    #[test]
    fn every_word_is_counted_somewhere() {
        for gpu in sample::gpus() {
            assert!(WORDS.contains(&word(&gpu).0), "{gpu:?}");
        }
        let states = [
            GpuState::Free,
            GpuState::Leased,
            GpuState::Bound,
            GpuState::InUse,
            GpuState::Draining,
            GpuState::Sanitizing,
            GpuState::Quarantined,
        ];
        assert_eq!(states.map(|s| state_word(s).0)[..], WORDS[..states.len()]);
    }

    #[test]
    fn what_a_host_process_calls_itself_stays_in_its_line() {
        let mut gpu = sample::gpus().remove(0);
        gpu.holders[0].name = "evil\x1b[2J\n  state  free".to_owned();
        let text = show(&sample::look(None), &gpu, Some("train\x07ing"));
        assert!(!text.contains(['\x1b', '\x07']) && text.contains("process evil   state  free"), "{text}");
        assert_eq!(text.lines().filter(|l| l.contains("state")).count(), 2, "{text}");
    }
}
