//! systemd over the system bus: the five calls the launcher needs. Called by `systemd`.
//!
//! The connection is made when it is first needed and made again when it broke: the bus may be restarted under a running
//! agent. Every call has a deadline. The caller must not be cancelled in the middle of a call, for a half-written message
//! would break the connection for everybody; `systemd` therefore calls from tasks of their own.

use std::{num::NonZeroUsize, time::Duration};

use futures_util::StreamExt;
use tokio::{sync::Mutex, time::timeout};
use zbus::{
    Connection, MatchRule, Message, MessageStream, OwnedObjectPath, OwnedVariant, Variant, message::Type,
};

use super::unit::{Properties, Property};

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const ROOT: &str = "/org/freedesktop/systemd1";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
/// systemd answers in milliseconds; only a host in trouble takes longer.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Signals of jobs that wait to be looked at; the stream is read all the time.
const QUEUE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);

/// systemd did not do what it was asked over the bus.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// There is no bus, or it lets nobody in.
    #[error("the system bus cannot be reached")]
    Connect(#[source] zbus::Error),
    /// A call was refused.
    #[error("systemd refused {method}")]
    Call {
        /// The method.
        method: &'static str,
        /// Why.
        #[source]
        source: zbus::Error,
    },
    /// No answer.
    #[error("systemd did not answer {method} within {after:?}")]
    TimedOut {
        /// The method, or what was waited for.
        method: &'static str,
        /// The deadline.
        after: Duration,
    },
}

impl BusError {
    fn is_absence(&self) -> bool {
        match self {
            Self::Call { source: zbus::Error::MethodError(name, _, _), .. } => name.as_str() == NO_SUCH_UNIT,
            _ => false,
        }
    }
}

fn refused(method: &'static str) -> impl Fn(zbus::Error) -> BusError {
    move |source| BusError::Call { method, source }
}

/// What systemd knows of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnitState {
    /// `active`, `activating`, `inactive`, `failed`, …
    pub(super) active: String,
    /// 0 when there is none.
    pub(super) main_pid: u32,
    /// Control group, from the root of the hierarchy.
    pub(super) cgroup: String,
    /// `success`, `exit-code`, `signal`, `oom-kill`, …
    pub(super) result: String,
    /// Exit status or signal of the program; from 200 on it is systemd's own, see systemd.exec(5).
    pub(super) status: i32,
}

/// A connection to systemd.
#[derive(Debug, Default)]
pub(super) struct Bus {
    connection: Mutex<Option<Connection>>,
}

impl Bus {
    /// The version, as systemd prints it: "252.39-1~deb12u1".
    pub(super) async fn version(&self) -> Result<String, BusError> {
        let value = self.property(ROOT, MANAGER, "Version").await?;
        String::try_from(value).map_err(refused("Version"))
    }

    /// Starts a transient unit and waits for the end of its job: "done", or a word that says how it failed. The unit is
    /// kept until [`Bus::release`] when its properties say so.
    pub(super) async fn start(
        &self,
        unit: &str,
        properties: &Properties,
        deadline: Duration,
    ) -> Result<String, BusError> {
        const METHOD: &str = "StartTransientUnit";
        let connection = self.connection().await?;
        let rule = MatchRule::builder()
            .msg_type(Type::Signal)
            .interface(MANAGER)
            .member("JobRemoved")
            .path(ROOT)
            .build();
        // Before the call: the job may be over before the reply is read.
        let jobs = MessageStream::for_match_rule(rule.map_err(refused(METHOD))?, &connection, Some(QUEUE));
        let mut jobs = jobs.await.map_err(refused(METHOD))?;
        let properties: Vec<(&str, Variant<'_>)> =
            properties.iter().map(|(name, value)| (*name, variant(value))).collect();
        let others: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
        let reply = self.call(ROOT, MANAGER, METHOD, &(unit, "fail", properties, others)).await?;
        let job: OwnedObjectPath = reply.body().deserialize().map_err(refused(METHOD))?;
        let ended = async {
            while let Some(signal) = jobs.next().await {
                let signal = signal.map_err(refused("JobRemoved"))?;
                // Anybody on the bus can send a signal that looks like this one.
                if signal.header().sender() != reply.header().sender() {
                    continue;
                }
                let (_, ended, _, result): (u32, OwnedObjectPath, String, String) =
                    signal.body().deserialize().map_err(refused("JobRemoved"))?;
                if ended == job {
                    return Ok(result);
                }
            }
            Err(BusError::TimedOut { method: "the start of a unit: the bus is gone", after: Duration::ZERO })
        };
        let late = |_| BusError::TimedOut { method: "the start of a unit", after: deadline };
        timeout(deadline, ended).await.map_err(late)?
    }

    /// `None`: systemd has no such unit.
    pub(super) async fn state(&self, unit: &str) -> Result<Option<UnitState>, BusError> {
        let found = self.call(ROOT, MANAGER, "GetUnit", &(unit,)).await;
        let path: OwnedObjectPath = match found {
            Err(error) if error.is_absence() => return Ok(None),
            found => found?.body().deserialize().map_err(refused("GetUnit"))?,
        };
        let read = async |interface, name| self.property(path.as_str(), interface, name).await;
        let read = tokio::try_join!(
            read(UNIT, "ActiveState"),
            read(SERVICE, "MainPID"),
            read(SERVICE, "ControlGroup"),
            read(SERVICE, "Result"),
            read(SERVICE, "ExecMainStatus"),
        );
        let (active, main_pid, cgroup, result, status) = match read {
            // Collected between two questions.
            Err(error) if error.is_absence() => return Ok(None),
            read => read?,
        };
        let state = (|| {
            Ok(UnitState {
                active: active.try_into()?,
                main_pid: main_pid.try_into()?,
                cgroup: cgroup.try_into()?,
                result: result.try_into()?,
                status: status.try_into()?,
            })
        })();
        state.map(Some).map_err(refused("Get"))
    }

    /// Lets go of a unit that was started with a reference.
    pub(super) async fn release(&self, unit: &str) -> Result<(), BusError> {
        known_absence(self.call(ROOT, MANAGER, "UnrefUnit", &(unit,)).await)
    }

    /// SIGKILL for everything in the unit.
    pub(super) async fn kill(&self, unit: &str) -> Result<(), BusError> {
        const SIGKILL: i32 = 9;
        known_absence(self.call(ROOT, MANAGER, "KillUnit", &(unit, "all", SIGKILL)).await)
    }

    /// Asks for the unit's end, also of one that is just starting; does not wait for it.
    pub(super) async fn stop(&self, unit: &str) -> Result<(), BusError> {
        known_absence(self.call(ROOT, MANAGER, "StopUnit", &(unit, "replace")).await)
    }

    async fn property(&self, path: &str, interface: &str, name: &str) -> Result<OwnedVariant, BusError> {
        let reply = self.call(path, "org.freedesktop.DBus.Properties", "Get", &(interface, name)).await?;
        reply.body().deserialize().map_err(refused("Get"))
    }

    async fn call<B>(
        &self,
        path: &str,
        interface: &str,
        method: &'static str,
        body: &B,
    ) -> Result<Message, BusError>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let connection = self.connection().await?;
        let reply = connection.call_method(Some(SYSTEMD), path, Some(interface), method, body);
        let late = |_| BusError::TimedOut { method, after: CALL_DEADLINE };
        timeout(CALL_DEADLINE, reply).await.map_err(late)?.map_err(refused(method))
    }

    async fn connection(&self) -> Result<Connection, BusError> {
        let mut kept = self.connection.lock().await;
        if let Some(connection) = kept.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok(connection.clone());
        }
        let late = |_| BusError::TimedOut { method: "the greeting of the bus", after: CALL_DEADLINE };
        let connecting = timeout(CALL_DEADLINE, Connection::system()).await.map_err(late)?;
        let connection = connecting.map_err(BusError::Connect)?;
        *kept = Some(connection.clone());
        Ok(connection)
    }
}

fn known_absence(reply: Result<Message, BusError>) -> Result<(), BusError> {
    match reply {
        Err(error) if error.is_absence() => Ok(()),
        reply => reply.map(|_| ()),
    }
}

fn variant(property: &Property) -> Variant<'_> {
    match property {
        Property::Text(text) => Variant::new(text.as_str()),
        Property::Texts(texts) => Variant::new(texts.clone()),
        Property::Flag(flag) => Variant::new(*flag),
        Property::Signed(number) => Variant::new(*number),
        Property::Short(number) => Variant::new(*number),
        Property::Number(number) => Variant::new(*number),
        Property::Pairs(pairs) => Variant::new(pairs.clone()),
        Property::Listed(allow, names) => Variant::new((*allow, names.clone())),
        Property::Networks(networks) => Variant::new(networks.clone()),
        Property::Binds(binds) => Variant::new(binds.clone()),
        Property::Checks(checks) => Variant::new(checks.clone()),
        Property::Commands(commands) => Variant::new(commands.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// systemd refuses a property of another type than its own.
    #[test]
    fn values_have_the_signatures_of_systemd() {
        let s = String::new;
        let table = [
            (Property::Text(s()), "s"),
            (Property::Texts(vec![]), "as"),
            (Property::Flag(true), "b"),
            (Property::Signed(1), "i"),
            (Property::Short(1), "u"),
            (Property::Number(1), "t"),
            (Property::Pairs(vec![]), "a(ss)"),
            (Property::Listed(true, vec![]), "(bas)"),
            (Property::Networks(vec![]), "a(iayu)"),
            (Property::Binds(vec![]), "a(ssbt)"),
            (Property::Checks(vec![]), "a(sbbs)"),
            (Property::Commands(vec![]), "a(sasb)"),
        ];
        for (property, signature) in table {
            assert_eq!(variant(&property).value_signature(), signature, "{property:?}");
        }
    }
}
