//! SSH keys of a guest: the renter's public keys ([`GuestKey`]), the pairs that the agent makes
//! ([`HostKey`], [`ManagementKey`]) and an `authorized_keys` file as data ([`AuthorizedKeys`]).
//! Called by the instance specification, the seed, the session and `authorize`.

mod authorized;
mod pair;
mod public;

pub use authorized::AuthorizedKeys;
pub use pair::{HostKey, KeyFileError, KeyGenerationError, ManagementKey};
pub use public::{GuestKey, KeyError, MAX_KEY_BYTES};
