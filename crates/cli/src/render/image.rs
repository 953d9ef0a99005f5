//! `image list` and what `image build` ends with.

use qudata_image::ImageRecord;
use serde::Serialize;

use super::{fields, line, table};
use crate::{
    screen::Look,
    units::{ago, size},
};

/// An image with what is not in its manifest.
#[derive(Debug, Serialize)]
pub(crate) struct Listed {
    #[serde(flatten)]
    pub(crate) record: ImageRecord,
    pub(crate) current: bool,
    /// Ids of instances, or their names where the agent knows them.
    pub(crate) used_by: Vec<String>,
}

/// `image list`.
pub(crate) fn table(look: &Look, images: &[Listed]) -> String {
    if images.is_empty() {
        return "there are no images: build one with `qudata-agent image build`\n".to_owned();
    }
    let header = ["ID", "MADE", "BASE", "DRIVER", "SIZE", "CURRENT", "USED BY"];
    let rows = images.iter().map(|image| {
        let record = &image.record;
        let used = match image.used_by.len() {
            0 => "-".to_owned(),
            1 => "1 instance".to_owned(),
            n => format!("{n} instances"),
        };
        [
            record.id.to_string(),
            ago(record.created_at, look.now),
            line(base(record)),
            driver(record),
            size(record.size),
            if image.current { "yes" } else { "-" }.to_owned(),
            used,
        ]
        .map(table::plain)
        .into()
    });
    table::table(look, &header, rows)
}

/// What was built; `current`: new instances get it.
pub(crate) fn show(look: &Look, record: &ImageRecord, current: bool) -> String {
    let mut lines = vec![
        ("image", record.id.to_string()),
        ("base", line(&record.base.from)),
        ("proof", line(&record.base.proof)),
    ];
    let optional = [("system", &record.system), ("kernel", &record.kernel)];
    lines.extend(optional.into_iter().filter_map(|(name, value)| Some((name, line(value.as_ref()?)))));
    lines.push(("driver", driver(record)));
    lines.push(("size", format!("{}, a disk of {}", size(record.size), size(record.virtual_size))));
    fields(look, &lines)
        + if current {
            "new instances get it; those that exist keep theirs\n"
        } else {
            "instances that exist keep theirs\n"
        }
}

fn driver(record: &ImageRecord) -> String {
    let words = record.driver.as_ref().map(|driver| format!("{} {}", driver.version, driver.modules));
    words.map_or_else(|| "-".to_owned(), |words| line(&words))
}

/// The last part of an address or a path; `debian-12` is whole.
fn base(record: &ImageRecord) -> &str {
    record.base.name.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use qudata_image::{BaseRecord, DriverRecord, Options};

    use super::{super::sample, *};

    fn record(id: &str, name: &str, driver: Option<&str>) -> ImageRecord {
        ImageRecord {
            id: id.parse().unwrap(),
            sha256: id.repeat(4),
            created_at: sample::look(None).now,
            size: 3 << 30,
            virtual_size: 10 << 30,
            base: BaseRecord {
                name: name.into(),
                from: "https://cloud-images.ubuntu.com/releases/24.04/release/ubuntu-24.04.img".into(),
                digest: format!("sha256:{}", "ab".repeat(32)),
                proof: "SHA256SUMS signed by a key of /usr/share/keyrings/k.gpg".into(),
            },
            options: Options {
                customised: true,
                driver: "auto".into(),
                packages: Vec::new(),
                jupyter: false,
                container_toolkit: false,
            },
            system: Some("Ubuntu 24.04.3 LTS".into()),
            kernel: Some("6.8.0-71-generic".into()),
            driver: driver.map(|version| DriverRecord { version: version.into(), modules: "open".into() }),
            packages: Vec::new(),
        }
    }

    #[test]
    fn images_as_people_see_them() {
        let new = Listed {
            record: record("0123456789abcdef", "ubuntu-24.04", Some("570.172.08")),
            current: true,
            used_by: vec!["a".into(), "b".into()],
        };
        let old = Listed {
            record: record("fedcba9876543210", "/srv/images/own.qcow2", None),
            current: false,
            used_by: Vec::new(),
        };
        let look = sample::look(Some(100));
        insta::assert_snapshot!("image_list", table(&look, &[new, old]));
        insta::assert_snapshot!(
            "image_show",
            show(&look, &record("0123456789abcdef", "ubuntu-24.04", Some("570.172.08")), true)
        );
        assert!(table(&look, &[]).contains("image build"));
    }
}
