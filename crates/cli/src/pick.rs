//! Which instance or GPU is meant. Owns the rules for names, ids, beginnings of ids and nothing at all, and for
//! addresses; used by every command on one instance or GPU.

use qudata_api::{GpuView, InstanceView};
use qudata_host::pci::PciAddress;
use uuid::Uuid;

use crate::{
    exit::{Exit, Failure},
    render::{gpu::short_name, line},
};

/// The instance that `wish` names; the only one when there is no wish. A whole id counts before a name, a name before
/// the beginning of an id.
pub(crate) fn pick<'a>(
    instances: &'a [InstanceView],
    wish: Option<&str>,
) -> Result<&'a InstanceView, Failure> {
    let Some(wish) = wish else { return sole(instances) };
    let by_id = wish.parse().ok().and_then(|id: Uuid| instances.iter().find(|i| i.id == id));
    if let Some(found) = by_id.or_else(|| instances.iter().find(|i| i.name == wish)) {
        return Ok(found);
    }
    let lower = wish.to_ascii_lowercase();
    let begins = |i: &&InstanceView| !lower.is_empty() && i.id.to_string().starts_with(&lower);
    let candidates: Vec<_> = instances.iter().filter(begins).collect();
    match candidates.as_slice() {
        [one] => Ok(one),
        [] => Err(none(instances, wish)),
        several => Err(Failure::new(
            Exit::Refused,
            format!("{wish:?} is the beginning of several ids: say which one:\n{}", lines(several)),
        )),
    }
}

fn sole(instances: &[InstanceView]) -> Result<&InstanceView, Failure> {
    match instances {
        [one] => Ok(one),
        [] => Err(Failure::new(
            Exit::NotFound,
            "there are no instances: create one with `qudata-agent instance create`",
        )),
        several => Err(Failure::new(
            Exit::Refused,
            format!(
                "there are several instances: say which one:\n{}",
                lines(&several.iter().collect::<Vec<_>>())
            ),
        )),
    }
}

fn none(instances: &[InstanceView], wish: &str) -> Failure {
    let known = match instances {
        [] => "there are none".to_owned(),
        all => format!("there are:\n{}", lines(&all.iter().collect::<Vec<_>>())),
    };
    Failure::new(Exit::NotFound, format!("there is no instance {wish:?}; {known}"))
}

fn lines(instances: &[&InstanceView]) -> String {
    let width = instances.iter().map(|i| i.name.chars().count()).max().unwrap_or(0);
    let lines: Vec<_> = instances.iter().map(|i| format!("  {:width$}  {}", i.name, i.id)).collect();
    lines.join("\n")
}

/// The GPU at `wish`, or that `wish` is another function of: all functions of a slot travel together.
pub(crate) fn pick_gpu(gpus: &[GpuView], wish: PciAddress) -> Result<&GpuView, Failure> {
    let address = wish.to_string();
    let itself = gpus.iter().find(|gpu| gpu.address == address);
    if let Some(found) = itself.or_else(|| gpus.iter().find(|gpu| gpu.functions.contains(&address))) {
        return Ok(found);
    }
    let known = match gpus {
        [] => "the agent has none: see `qudata-agent status`".to_owned(),
        all => {
            let lines: Vec<_> =
                all.iter().map(|gpu| format!("  {}  {}", line(&gpu.address), short_name(gpu))).collect();
            format!("there are:\n{}", lines.join("\n"))
        }
    };
    Err(Failure::new(Exit::NotFound, format!("there is no GPU {address}; {known}")))
}

/// The shortest beginning of `id` that no other has, at least eight characters: what [`pick`] takes.
pub(crate) fn short_id(id: Uuid, all: &[InstanceView]) -> String {
    let text = id.to_string();
    let others: Vec<_> = all.iter().filter(|i| i.id != id).map(|i| i.id.to_string()).collect();
    let unique = |len: &usize| text.get(..*len).is_some_and(|s| others.iter().all(|o| !o.starts_with(s)));
    let len = (8..text.len()).find(unique).unwrap_or(text.len());
    text.chars().take(len).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::{self, instance};

    fn three() -> Vec<InstanceView> {
        vec![
            instance("web", "0197a000-0000-7000-8000-000000000001"),
            instance("db", "0197a000-0000-7000-8000-000000000002"),
            instance("0197b", "0297a000-0000-7000-8000-000000000003"),
        ]
    }

    #[test]
    fn names_ids_and_beginnings() {
        let all = three();
        let table = [
            ("web", Some(0)),
            ("0197A000-0000-7000-8000-000000000002", Some(1)),
            ("0197a00000007000800000000000000", None),
            ("02", Some(2)),
            ("0197b", Some(2)),
            ("we", None),
            ("", None),
            ("ffffffff-0000-7000-8000-000000000001", None),
        ];
        for (wish, expected) in table {
            let got = pick(&all, Some(wish));
            match expected {
                Some(i) => assert_eq!(got.unwrap().id, all[i].id, "{wish}"),
                None => assert_eq!(got.unwrap_err().exit, Exit::NotFound, "{wish}"),
            }
        }
    }

    #[test]
    fn what_is_not_clear_is_refused_with_candidates() {
        let all = three();
        let by_prefix = pick(&all, Some("0197a")).unwrap_err();
        assert_eq!(by_prefix.exit, Exit::Refused);
        assert!(by_prefix.sentence.contains("web  0197a000-") && !by_prefix.sentence.contains("0297a"));
        let nothing = pick(&all, None).unwrap_err();
        assert_eq!(nothing.exit, Exit::Refused);
        assert_eq!(nothing.sentence.lines().count(), 4, "{nothing}");
    }

    #[test]
    fn the_only_one_need_not_be_named() {
        let all = three();
        assert_eq!(pick(&all[1..2], None).unwrap().name, "db");
        assert_eq!(pick(&[], None).unwrap_err().exit, Exit::NotFound);
    }

    #[test]
    fn gpus_by_any_function_of_their_slot() {
        let gpus = sample::gpus();
        for (wish, expected) in
            [("0000:66:00.0", Some(1)), ("66:00.0", Some(1)), ("65:00.1", Some(0)), ("66:00.1", None)]
        {
            let got = pick_gpu(&gpus, wish.parse().unwrap());
            match expected {
                Some(i) => assert_eq!(got.unwrap().address, gpus[i].address, "{wish}"),
                None => {
                    let failure = got.unwrap_err();
                    assert_eq!(failure.exit, Exit::NotFound);
                    let sentence =
                        "there is no GPU 0000:66:00.1; there are:\n  0000:65:00.0  H100 SXM5 80GB\n";
                    assert!(failure.sentence.starts_with(sentence), "{failure}");
                }
            }
        }
        let nobody = pick_gpu(&[], "66:00.0".parse().unwrap()).unwrap_err();
        assert!(nobody.exit == Exit::NotFound && nobody.sentence.contains("status"), "{nobody}");
    }

    #[test]
    fn short_ids_are_accepted_and_mean_the_same() {
        let all = three();
        for one in &all {
            let short = short_id(one.id, &all);
            assert_eq!(pick(&all, Some(&short)).unwrap().id, one.id);
        }
        assert_eq!(short_id(all[2].id, &all), "0297a000");
    }
}
