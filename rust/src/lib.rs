//! Torpor's Rust half: one static library, since two of them in one program clash over Rust's runtime. The text shim is always
//! in it, the HTTP edge with the feature `http`, grammars with `grammar`, a terminal's lines with `line`, object
//! stores with `remote`, the Hugging Face Hub with `hub`. The headers of include/ are the contract.

// The safety rules of all functions are the headers'.
#![allow(clippy::missing_safety_doc)]

mod abi;
#[cfg(feature = "grammar")]
mod grammar;
#[cfg(feature = "http")]
mod http;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "line")]
mod line;
#[cfg(feature = "remote")]
mod remote;
#[cfg(any(feature = "http", feature = "hub", feature = "remote"))]
mod runtime;
mod text;
