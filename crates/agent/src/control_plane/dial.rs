//! From the name of the control plane to a connection whose other end has proven who it is. Called by `call`, which bounds
//! the time it takes.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::future;
use tokio::{net::TcpStream, time::sleep};
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::pki_types::ServerName};

use super::{
    tls::{Trust, TrustError},
    url::ServiceUrl,
};

/// A service has few addresses; trying them all must not take longer than the deadline.
const MOST_ADDRESSES: usize = 4;
/// How long one address may stay silent before the next is tried beside it.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// There is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// The name is unknown.
    #[error("the name {host} cannot be resolved")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A name that was to be this machine's is another's.
    #[error("{host} is no address of this machine, and without https nothing else may be called")]
    NotLoopback {
        /// The name.
        host: String,
    },
    /// Nobody answers there.
    #[error("cannot connect to {authority}")]
    Connect {
        /// Where.
        authority: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The other side did not prove that it is the control plane.
    #[error("{authority} did not prove that it is the control plane")]
    Tls {
        /// Where.
        authority: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// This host trusts nobody.
    #[error("the certificate authorities of this host cannot be used")]
    Trust(#[source] TrustError),
}

/// A connection.
pub(super) enum Line {
    /// To this machine.
    Plain(TcpStream),
    /// To anywhere.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Connects.
///
/// # Errors
/// When the name is unknown, nobody answers, or the wrong one does.
pub(super) async fn dial(url: &ServiceUrl, trust: &Trust) -> Result<Line, DialError> {
    let addresses = allowed(url, resolve(url).await?)?;
    let authority = url.authority();
    let connected = first_of(addresses).await;
    let stream = connected.map_err(|source| DialError::Connect { authority: authority.clone(), source })?;
    if !url.is_tls() {
        return Ok(Line::Plain(stream));
    }
    let config = trust.config().await.map_err(DialError::Trust)?;
    let tls = |source| DialError::Tls { authority: authority.clone(), source };
    let name = ServerName::try_from(url.host().to_owned())
        .map_err(|error| tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(tls)?;
    Ok(Line::Tls(Box::new(stream)))
}

/// A connection to the first address that answers; of several failures the last one.
async fn first_of(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let tries = addresses.into_iter().zip(0_u32..).map(|(address, place)| {
        Box::pin(async move {
            sleep(NEXT_ADDRESS.saturating_mul(place)).await;
            TcpStream::connect(address).await
        })
    });
    future::select_ok(tries).await.map(|(stream, _)| stream)
}

async fn resolve(url: &ServiceUrl) -> Result<Vec<SocketAddr>, DialError> {
    let (host, port) = (url.host(), url.port());
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![(address, port).into()]);
    }
    let failed = |source| DialError::Resolve { host: host.to_owned(), source };
    let found: Vec<SocketAddr> =
        tokio::net::lookup_host((host, port)).await.map_err(failed)?.take(MOST_ADDRESSES).collect();
    // `select_ok` of nothing would have nothing to say.
    if found.is_empty() { Err(failed(io::ErrorKind::NotFound.into())) } else { Ok(found) }
}

/// What resolvers and hosts files say of a name is not believed where no certificate proves it.
fn allowed(url: &ServiceUrl, found: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, DialError> {
    if url.is_tls() {
        return Ok(found);
    }
    let here: Vec<SocketAddr> = found.into_iter().filter(|address| address.ip().is_loopback()).collect();
    if here.is_empty() { Err(DialError::NotLoopback { host: url.host().to_owned() }) } else { Ok(here) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_tls_only_this_machine_is_called_whatever_the_resolver_says() {
        let at = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let local: ServiceUrl = "http://localhost:80".parse().unwrap();
        assert!(matches!(allowed(&local, at(&["203.0.113.7:80"])), Err(DialError::NotLoopback { .. })));
        let mixed = at(&["203.0.113.7:80", "[::1]:80", "127.0.0.1:80"]);
        assert_eq!(allowed(&local, mixed.clone()).unwrap(), at(&["[::1]:80", "127.0.0.1:80"]));
        let secure: ServiceUrl = "https://localhost".parse().unwrap();
        assert_eq!(allowed(&secure, mixed.clone()).unwrap(), mixed);
    }

    #[tokio::test]
    async fn an_address_where_nobody_listens_is_passed_over() {
        let open = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (open_at, closed_at) = (open.local_addr().unwrap(), closed.local_addr().unwrap());
        drop(closed);
        let stream = first_of(vec![closed_at, open_at]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open_at);
        let error = first_of(vec![closed_at]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
