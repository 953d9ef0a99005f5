//! Whole installations on made-up hosts: plans as golden texts, refusals, cuts at every point, and back.

mod cuts;
mod life;
mod plans;
mod refusals;
mod tree;
mod world;
