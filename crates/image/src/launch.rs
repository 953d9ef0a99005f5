//! How programs are started that work hard for a build: as the machine's user, ending with this program, and behind
//! everything that a renter needs. Pure; called by `boot` and `pack`.

use std::ffi::OsString;

use qudata_qemu::disk::Owner;

/// The program that is started.
pub(crate) const PROGRAM: &str = "setpriv";

/// Arguments of [`PROGRAM`] before the program that is meant. `group`: one more that it needs.
pub(crate) fn plan_args(user: Option<Owner>, group: Option<u32>) -> Vec<OsString> {
    let mut args: Vec<OsString> = ["--no-new-privs", "--pdeathsig", "KILL"].map(Into::into).into();
    if let Some(user) = user {
        args.push(format!("--reuid={}", user.uid).into());
        args.push(format!("--regid={}", user.gid).into());
        args.push(group.map_or_else(|| "--clear-groups".into(), |group| format!("--groups={group}").into()));
    }
    // When memory runs out the kernel takes the process with the highest score: this one, and no renter's machine. It is
    // of use to nobody yet.
    args.extend(["--", "choom", "-n", "1000", "--", "nice", "-n", "10", "--"].map(Into::into));
    args
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn said(user: Option<Owner>, group: Option<u32>) -> String {
        let script = "cat /proc/self/oom_score_adj; nice; id -u; id -G";
        let mut command = Command::new(PROGRAM);
        let out = command.args(plan_args(user, group)).args(["sh", "-c", script]).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    #[test]
    fn builds_are_the_first_that_the_kernel_ends_and_the_last_that_get_a_cpu() {
        let before: i32 =
            String::from_utf8(Command::new("nice").output().unwrap().stdout).unwrap().trim().parse().unwrap();
        let expected = format!("1000\n{}\n", (before + 10).min(19));
        assert!(said(None, None).starts_with(&expected));
        if rustix::process::geteuid().is_root() {
            let user = Some(Owner { uid: 719_999, gid: 719_998 });
            assert_eq!(said(user, None), format!("{expected}719999\n719998\n"));
            assert_eq!(said(user, Some(719_997)), format!("{expected}719999\n719998 719997\n"));
        }
    }
}
