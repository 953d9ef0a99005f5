//! What a self-test that was cut off leaves: how its instance is told from somebody's. Called by `install`.
//!
//! A name alone proves nothing, for a renter may choose any. So before each self-test the instances that are there are
//! written down; the note goes when the test has cleared up behind itself.

use crate::{
    error::SetupError,
    outside::{Means, Tenant},
};

/// The ids of the instances that were there before.
const NOTE: &str = "/var/lib/qudata/setup/selftest.json";
/// How a self-test names its instances; eight hex digits follow.
const PREFIX: &str = "selftest-";

/// A self-test begins.
pub(super) fn expect(means: Means<'_>, tenants: &[Tenant]) -> Result<(), SetupError> {
    let ids: Vec<&str> = tenants.iter().map(|tenant| tenant.id.as_str()).collect();
    let bytes = serde_json::to_vec(&ids).map_err(|e| SetupError::file("write", NOTE, e))?;
    means.files.write(NOTE, &bytes, means.files.mine(0o600))
}

/// It has cleared up.
pub(super) fn forget(means: Means<'_>) -> Result<(), SetupError> {
    means.files.remove(NOTE).map(drop)
}

/// The instances that were there before the self-test that did not come to its end; none: every one did.
pub(super) fn before(means: Means<'_>) -> Result<Option<Vec<String>>, SetupError> {
    let Some(bytes) = means.files.read(NOTE)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| SetupError::file("read", NOTE, e))
}

/// Whether it is the test's: named like one, and not there before it.
pub(super) fn is_one(tenant: &Tenant, before: &[String]) -> bool {
    let digits = tenant.name.strip_prefix(PREFIX).unwrap_or_default();
    let named = digits.len() == 8 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    named && !before.contains(&tenant.id)
}
