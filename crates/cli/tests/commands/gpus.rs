//! The commands on GPUs, and GPUs in the commands on instances and the host.

use serde_json::{Value, json};

use super::{
    A, B,
    fake_agent::{Answer, FakeAgent},
    host, instance, listed, with_web,
};

const FREE: &str = "0000:66:00.0";
const USED: &str = "0000:65:00.0";

fn gpu(address: &str, state: &str) -> Value {
    json!({
        "address": address, "name": "NVIDIA Corporation GH100 [H100 SXM5 80GB]", "vendor_id": "10de",
        "device_id": "2330", "state": state, "since": "2026-01-02T09:47:00Z", "rentable": state != "quarantined",
        "driver": "nvidia", "functions": [address, address.replace(".0", ".1")], "iommu_group": 41, "numa_node": 0,
        "link": { "speed": 2.5, "width": 16, "max_speed": 32.0, "max_width": 16 }, "bar_bytes": 1_u64 << 37,
        "reset_methods": ["flr", "bus"], "holders": [{ "kind": "process", "name": "python3", "pid": 977 }],
    })
}

fn with(mut view: Value, more: Value) -> Value {
    view.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    view
}

fn used() -> Value {
    with(gpu(USED, "in_use"), json!({ "instance": A }))
}

fn quarantined() -> Value {
    with(
        gpu(FREE, "quarantined"),
        json!({ "why": "the reset failed", "remedy": "power the host off and on" }),
    )
}

/// An agent with these GPUs, the instance `web`, and more calls.
fn agent(gpus: &[Value], more: Vec<(&str, Vec<Answer>)>) -> FakeAgent {
    let mut script = vec![("GET /gpus", vec![Answer::data(&gpus)])];
    script.extend(more);
    with_web(script)
}

/// The calls that are no reads.
fn changes(agent: &FakeAgent) -> Vec<String> {
    agent.asked().into_iter().map(|a| a.call).filter(|call| !call.starts_with("GET ")).collect()
}

#[test]
fn gpus_and_their_owners() {
    let agent = agent(&[used(), gpu(FREE, "free")], vec![]);
    let out = agent.run("gpu list").exits(0).out;
    let line = out.lines().find(|l| l.starts_with(USED)).unwrap();
    assert!(
        line.contains("GH100 [H100 SXM5 80GB]  nvidia     41     0  in use") && line.ends_with("web"),
        "{out}"
    );
    assert_eq!(out.lines().count(), 3, "nothing is wrong: {out}");
    assert_eq!(agent.run("gpu list --json").exits(0).json(), json!([used(), gpu(FREE, "free")]));
}

#[test]
fn the_list_says_what_is_wrong_and_what_to_do() {
    let refusal = json!({
        "code": "no_remapping", "message": "interrupts are not remapped", "remedy": "switch on VT-d in the firmware",
        "since": "2026-01-02T09:47:00Z", "by_choice": false,
    });
    let refused = with(gpu(USED, "free"), json!({ "rentable": false, "refusal": refusal }));
    let out = agent(&[refused, quarantined()], vec![]).run("gpu list").exits(0).out;
    assert!(out.lines().any(|l| l.starts_with(USED) && l.contains("refused")), "{out}");
    assert!(out.contains(&format!("● GPU {USED}: interrupts are not remapped (no_remapping,")), "{out}");
    assert!(out.contains("  → switch on VT-d in the firmware\n"), "{out}");
    assert!(
        out.contains(&format!("● GPU {FREE} is quarantined: the reset failed (gpu_quarantined,")),
        "{out}"
    );
    assert!(out.contains("  → power the host off and on\n"), "{out}");
    let none = agent(&[], vec![]).run("gpu list").exits(0).out;
    assert_eq!(none, "the agent has no GPUs\n");
}

#[test]
fn the_topology_is_a_matrix_with_a_legend() {
    let topology = json!({
        "gpus": [
            { "address": USED, "name": "H100", "iommu_group": 41, "numa_node": 0 },
            { "address": FREE, "iommu_group": 77 },
        ],
        "matrix": [["X", "SYS"], ["SYS", "X"]],
        "legend": [{ "distance": "SYS", "meaning": "different NUMA nodes" }],
    });
    let agent = FakeAgent::start(vec![("GET /gpus/topology", vec![Answer::data(&topology)])]);
    let out = agent.run("gpu topo").exits(0).out;
    let expected = [
        "      GPU0  GPU1  NUMA  GROUP  ADDRESS       NAME",
        "GPU0  X     SYS   0     41     0000:65:00.0  H100",
        "GPU1  SYS   X     -     77     0000:66:00.0  -",
        "",
        "LEGEND",
        "  SYS   different NUMA nodes",
    ];
    assert_eq!(out.lines().collect::<Vec<_>>(), expected);
    assert_eq!(agent.run("gpu topo --json").exits(0).json(), topology);
}

#[test]
fn show_by_any_address_of_the_slot() {
    let agent = agent(
        &[used(), gpu(FREE, "free")],
        vec![(&format!("GET /gpus/{USED}"), vec![Answer::data(&used())])],
    );
    for address in [USED, "65:00.0", "65:00.1"] {
        let out = agent.run(&format!("gpu show {address}")).exits(0).out;
        for part in [
            "in use for",
            &format!("web ({A})"),
            "10de:2330",
            "16 lanes, 2.5 of 32 GT/s",
            "128 GiB",
            "python3 (pid 977)",
        ] {
            assert!(out.contains(part), "{part}: {out}");
        }
    }
    assert_eq!(agent.run("gpu show 65:00.0 --json").exits(0).json(), used());
    for command in ["show 67:00.0", "quarantine 67:00.0 --reason x --yes", "release 67:00.0 --yes"] {
        let ended = agent.run(&format!("gpu {command}")).exits(4);
        assert!(ended.err.contains("no GPU 0000:67:00.0") && ended.err.contains(FREE), "{ended:?}");
    }
    assert_eq!(changes(&agent), [""; 0]);
}

#[test]
fn what_changes_a_gpu_asks_first() {
    let agent = agent(&[used(), quarantined()], vec![]);
    let ended = agent.run("gpu quarantine 65:00.0 --reason loud").exits(2);
    assert!(ended.err.contains("GPU 0000:65:00.0 (H100 SXM5 80GB, in use for"), "{ended:?}");
    assert!(ended.err.contains("by web)") && ended.err.contains("--yes"), "{ended:?}");
    let ended = agent.run("gpu release 66:00.0").exits(2);
    assert!(ended.err.contains("Release GPU 0000:66:00.0") && ended.err.contains("--yes"), "{ended:?}");
    assert_eq!(changes(&agent), [""; 0]);
}

#[test]
fn quarantine_says_what_became_of_it() {
    let free = format!("POST /gpus/{FREE}/quarantine");
    let lent = format!("POST /gpus/{USED}/quarantine");
    let marked = with(used(), json!({ "why": "loud" }));
    let agent = agent(
        &[used(), gpu(FREE, "free")],
        vec![(&free, vec![Answer::data(&quarantined())]), (&lent, vec![Answer::data(&marked)])],
    );
    let mut command = agent.command("gpu quarantine 66:00.0 --yes --reason");
    let ended = super::Ended::of(command.arg("fan is loud").output().unwrap()).exits(0);
    assert_eq!(ended.out, "0000:66:00.0 is quarantined\n");
    assert!(ended.err.contains("gpu release 0000:66:00.0"), "{ended:?}");
    assert_eq!(agent.body_of(&free), json!({ "reason": "fan is loud" }));
    let ended = agent.run("gpu quarantine 65:00.0 --yes --reason loud").exits(0);
    assert_eq!(ended.out, "0000:65:00.0 is in use, and quarantined as soon as it comes back\n");
    let json = agent.run("gpu quarantine 65:00.0 --yes --reason loud --json").exits(0).json();
    assert_eq!(json, marked);
}

#[test]
fn release_waits_for_the_check() {
    let view = format!("GET /gpus/{FREE}");
    let call = format!("POST /gpus/{FREE}/release");
    let (draining, sanitizing) =
        (Answer::data(&gpu(FREE, "draining")), Answer::data(&gpu(FREE, "sanitizing")));
    let passed = agent(
        &[quarantined()],
        vec![
            (&call, vec![draining.clone()]),
            (&view, vec![sanitizing.clone(), Answer::data(&gpu(FREE, "free"))]),
        ],
    );
    let ended = passed.run("gpu release 66:00.0 --yes").exits(0);
    assert_eq!(ended.out, "0000:66:00.0 is free\n");
    assert_eq!(passed.body_of(&call), Value::Null);
    assert_eq!(passed.asked().iter().filter(|a| a.call == view).count(), 2);

    let again = Answer::data(&quarantined());
    let failed = agent(&[quarantined()], vec![(&call, vec![draining]), (&view, vec![sanitizing, again])]);
    let ended = failed.run("gpu release 66:00.0 --yes --json").exits(1);
    assert!(ended.err.contains("did not pass") && ended.err.contains("the reset failed"), "{ended:?}");
    assert!(ended.err.contains("power the host off and on"), "{ended:?}");
    assert_eq!(ended.json()["state"], "quarantined");
}

#[test]
fn release_is_refused_where_there_is_nothing_to_release() {
    let agent_of = |answer| {
        let call = format!("POST /gpus/{FREE}/release");
        agent(&[used(), quarantined()], vec![(&call, vec![answer])])
    };
    let wedged =
        agent_of(Answer::error(409, "wrong_state", "an operation hangs in the kernel: reboot the host"));
    let ended = wedged.run("gpu release 65:00.0 --yes").exits(5);
    assert!(ended.err.contains("is in use: only a quarantined GPU"), "{ended:?}");
    assert_eq!(changes(&wedged), [""; 0]);
    assert!(wedged.run("gpu release 66:00.0 --yes").exits(5).err.contains("reboot the host"));
    let gone = agent_of(Answer::error(404, "no_such_gpu", "there is no such GPU"));
    gone.run("gpu release 66:00.0 --yes").exits(4);
}

#[test]
fn release_of_a_gpu_that_is_gone_for_good_forgets_it() {
    let call = format!("POST /gpus/{FREE}/release");
    let gone = |state| with(gpu(FREE, state), json!({ "vendor_id": null, "device_id": null, "name": null }));
    let agent = agent(&[gone("quarantined")], vec![(&call, vec![Answer::data(&gone("free"))])]);
    let ended = agent.run("gpu release 66:00.0 --yes").exits(0);
    assert_eq!(ended.out, "0000:66:00.0 is forgotten\n");
    assert!(ended.err.contains("quarantined again") && !ended.err.contains("checking"), "{ended:?}");
}

#[test]
fn an_instance_is_shown_with_its_gpus() {
    let mut web = instance("web", A);
    web["gpus"] = json!([USED, FREE]);
    let view = format!("GET /instances/{A}");
    let agent = FakeAgent::start(vec![
        ("GET /instances", vec![listed(&[web.clone(), instance("db", B)])]),
        ("GET /gpus", vec![Answer::data(&json!([used(), gpu(FREE, "bound")]))]),
        (&view, vec![Answer::data(&web)]),
    ]);
    let out = agent.run("instance show web").exits(0).out;
    assert!(out.contains("0000:65:00.0  NVIDIA Corporation GH100 [H100 SXM5 80GB]\n"), "{out}");
    assert!(out.contains("0000:66:00.0  NVIDIA Corporation GH100 [H100 SXM5 80GB]  bound\n"), "{out}");
    let list = agent.run("instance list").exits(0).out;
    assert!(list.lines().next().unwrap().contains("GPUS"), "{list}");
    let json = agent.run("instance show web --json").exits(0).json();
    assert_eq!(json["gpus"], json!([USED, FREE]));
}

#[test]
fn a_gpu_in_quarantine_is_a_problem_of_the_host() {
    let told = json!([{ "code": "gpu_quarantined", "message": format!("GPU {FREE} is quarantined: the reset failed"),
                        "remedy": "power the host off and on", "since": "2026-01-02T09:47:00Z" }]);
    for problems in [json!([]), told] {
        let agent = agent(&[used(), quarantined()], vec![("GET /host", vec![host(&problems)])]);
        let out = agent.run("status").exits(1).out;
        assert!(out.starts_with("● qudata-agent 0.1.0: 1 problem\n"), "{out}");
        assert!(out.contains("GPUs  2: 1 in use, 1 quarantined\n"), "{out}");
        assert_eq!(out.matches("the reset failed").count(), 1, "told once: {out}");
    }
}
