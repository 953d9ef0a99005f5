//! One GET over a connection to the agent's socket that is there already. Bounded in size here, in time by the callers.

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use qudata_host::causes::chain;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::observed::{Seen, Unseen};

/// The list of the GPUs of a large server has some ten thousand bytes.
const MOST: usize = 4 << 20;

/// Status and body of the answer.
pub(super) async fn get<S>(stream: S, host: &str, path: &str) -> Seen<(u16, Bytes)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed =
        |error: &dyn std::error::Error| Unseen::Failed(format!("no answer in HTTP: {}", chain(error)));
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, concat!("qudata-agent/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| failed(&error))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MOST).collect().await;
        let body = body.map_err(|error| failed(&*error))?.to_bytes();
        Ok((status, body))
    };
    // Driven here, so that nothing is left behind when the caller gives up.
    let mut connection = std::pin::pin!(connection);
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        _ = &mut connection => exchange.await,
    }
}
