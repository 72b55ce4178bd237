// Package pb is the control plane's gRPC definitions and the code generated
// from them by `make proto`.
//
// Duty: the messages of metadata and host control; values in the metadata
// state are these messages too. Floor: F0. Nothing here is written by hand but
// the .proto files.
package pb
