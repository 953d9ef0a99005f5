//! What the service's side of the contract says about a call: which header, which fields, which values. Pure; called by
//! the parent module, which refuses what is not so.

use serde_json::{Map, Value};

/// One field of a body.
struct Field {
    name: &'static str,
    required: bool,
    /// What is wrong with a value, if anything.
    fault: fn(&Value) -> Option<String>,
}

const fn field(name: &'static str, fault: fn(&Value) -> Option<String>) -> Field {
    Field { name, required: true, fault }
}

const INIT: &[Field] = &[
    field("agent_id", uuid),
    field("agent_port", port),
    field("address", ipv4),
    field("fingerprint", words),
    field("pid", positive),
    field("version", words),
    Field { name: "test_mode", required: false, fault: flag },
];

const HOST: &[Field] = &[
    field("gpu_name", gpu_name),
    field("gpu_amount", whole),
    field("vram", number),
    field("max_cuda", number),
    field("location", |value| object(value, LOCATION)),
    field("configuration", |value| object(value, CONFIGURATION)),
];

const LOCATION: &[Field] = &[field("city", text), field("country", text), field("region", words)];

const CONFIGURATION: &[Field] = &[
    field("ram", amount),
    field("disk", amount),
    field("cpu_name", words),
    field("cpu_cores", positive),
    field("cpu_freq", number),
    field("memory_speed", number),
    field("ethernet_in", number),
    field("ethernet_out", number),
    // The contract names it without a type.
    field("capacity", scalar),
    field("max_cuda_version", number),
];

const AMOUNT: &[Field] = &[field("amount", number), field("unit", words)];

const STATS: &[Field] = &[
    field("gpu_util", percent),
    field("gpu_temp", temperature),
    field("cpu_util", percent),
    field("ram_util", percent),
    field("mem_util", percent),
    field("inet_in", number),
    field("inet_out", number),
    field("status", status),
];

/// What is wrong with the body of a call; nothing for a good one. None for a call that the service does not have.
pub(super) fn faults(method: &str, path: &str, body: &Value) -> Option<Vec<String>> {
    let fields = match (method, path) {
        ("GET", "/ping") => return Some(Vec::new()),
        ("POST", "/init") => INIT,
        ("POST", "/init/host") => HOST,
        ("POST", "/stats") => STATS,
        _ => return None,
    };
    Some(match body.as_object() {
        Some(body) => of_fields(body, fields),
        None => vec![format!("the body of {path} is no JSON object")],
    })
}

fn of_fields(body: &Map<String, Value>, fields: &[Field]) -> Vec<String> {
    let mut faults = Vec::new();
    for Field { name, required, fault } in fields {
        match body.get(*name) {
            None if *required => faults.push(format!("{name} is missing")),
            None => {}
            Some(value) => faults.extend(fault(value).map(|why| format!("{name} {why}"))),
        }
    }
    let unknown = body.keys().filter(|name| fields.iter().all(|field| field.name != name.as_str()));
    faults.extend(unknown.map(|name| format!("{name} is not in the contract")));
    faults
}

fn unless(good: bool, value: &Value, expected: &str) -> Option<String> {
    (!good).then(|| format!("is {value}, not {expected}"))
}

fn object(value: &Value, fields: &[Field]) -> Option<String> {
    let Some(inner) = value.as_object() else { return unless(false, value, "an object") };
    let faults = of_fields(inner, fields);
    (!faults.is_empty()).then(|| format!("has faults: {}", faults.join(", ")))
}

fn amount(value: &Value) -> Option<String> {
    object(value, AMOUNT)
        .or_else(|| unless(value.get("unit").is_some_and(|unit| unit == "gb"), value, "in the unit gb"))
}

fn text(value: &Value) -> Option<String> {
    unless(value.is_string(), value, "a text")
}

fn words(value: &Value) -> Option<String> {
    unless(value.as_str().is_some_and(|text| !text.trim().is_empty()), value, "a text that says something")
}

fn gpu_name(value: &Value) -> Option<String> {
    let good = |text: &str| !text.contains(char::is_whitespace) && !text.to_lowercase().starts_with("nvidia");
    unless(value.as_str().is_some_and(good), value, "a name without vendor and spaces")
}

fn uuid(value: &Value) -> Option<String> {
    let good = |text: &str| {
        let lengths: Vec<usize> = text.split('-').map(str::len).collect();
        lengths == [8, 4, 4, 4, 12] && text.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit())
    };
    unless(value.as_str().is_some_and(good), value, "a uuid")
}

fn ipv4(value: &Value) -> Option<String> {
    let good = |text: &str| text.parse::<std::net::Ipv4Addr>().is_ok();
    unless(value.as_str().is_some_and(good), value, "an IPv4 address")
}

fn port(value: &Value) -> Option<String> {
    unless(value.as_u64().is_some_and(|port| (1..=65_535).contains(&port)), value, "a port")
}

fn whole(value: &Value) -> Option<String> {
    unless(value.is_u64(), value, "a whole number")
}

fn positive(value: &Value) -> Option<String> {
    unless(value.as_u64().is_some_and(|number| number > 0), value, "a number above zero")
}

fn number(value: &Value) -> Option<String> {
    unless(value.as_f64().is_some_and(|number| number.is_finite() && number >= 0.0), value, "a number")
}

fn scalar(value: &Value) -> Option<String> {
    unless(value.is_number() || value.is_string(), value, "a number or a text")
}

fn percent(value: &Value) -> Option<String> {
    unless(value.as_f64().is_some_and(|number| (0.0..=100.0).contains(&number)), value, "within 0 to 100")
}

fn temperature(value: &Value) -> Option<String> {
    unless(value.as_f64().is_some_and(|number| (0.0..=150.0).contains(&number)), value, "within 0 to 150")
}

fn flag(value: &Value) -> Option<String> {
    unless(value.is_boolean(), value, "true or false")
}

fn status(value: &Value) -> Option<String> {
    const ALL: [&str; 6] = ["destroyed", "pending", "running", "paused", "rebooting", "error"];
    unless(value.as_str().is_some_and(|text| ALL.contains(&text)), value, "a status of the contract")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn init() -> Value {
        json!({
            "agent_id": "01234567-89ab-4cde-8f01-23456789abcd", "agent_port": 15001, "address": "203.0.113.7",
            "fingerprint": "0123456789abcdef", "pid": 4711, "version": "0.1.0",
        })
    }

    #[test]
    fn good_bodies_have_no_faults() {
        let host = json!({
            "gpu_name": "TeslaT4", "gpu_amount": 2, "vram": 16, "max_cuda": 12.4,
            "location": { "city": "", "country": "NL", "region": "ru1" },
            "configuration": {
                "ram": { "amount": 62.8, "unit": "gb" }, "disk": { "amount": 500, "unit": "gb" },
                "cpu_name": "EPYC", "cpu_cores": 32, "cpu_freq": 3.4, "memory_speed": 3200, "ethernet_in": 1000,
                "ethernet_out": 1000, "capacity": 0, "max_cuda_version": 12.4,
            },
        });
        let stats = json!({
            "gpu_util": 0, "gpu_temp": 41, "cpu_util": 12.5, "ram_util": 3, "mem_util": 0, "inet_in": 0,
            "inet_out": 17, "status": "running",
        });
        let calls = [("/init", init()), ("/init/host", host), ("/stats", stats)];
        for (path, body) in calls {
            assert_eq!(faults("POST", path, &body), Some(Vec::new()), "{path}");
        }
        assert_eq!(faults("GET", "/ping", &Value::Null), Some(Vec::new()));
    }

    #[test]
    fn each_broken_field_is_named() {
        for (name, value) in [
            ("agent_id", json!("x")),
            ("agent_port", json!(70_000)),
            ("address", json!("fe80::1")),
            ("fingerprint", json!("")),
            ("pid", json!(0)),
            ("version", Value::Null),
            ("test_mode", json!("yes")),
            ("surprise", json!(1)),
        ] {
            let mut body = init();
            body[name] = value;
            let found = faults("POST", "/init", &body).unwrap();
            assert!(found.len() == 1 && found[0].starts_with(name), "{name}: {found:?}");
        }
        let mut body = init();
        body.as_object_mut().unwrap().remove("pid");
        assert_eq!(faults("POST", "/init", &body), Some(vec!["pid is missing".to_owned()]));
        assert_eq!(faults("POST", "/init", &json!([])).unwrap().len(), 1);
        assert_eq!(faults("GET", "/init", &init()), None);
        assert_eq!(faults("POST", "/elsewhere", &init()), None);
    }
}
