// Package ids names the things of a cairn cluster by type, so that a chunk's
// id can never be passed where its index is meant.
//
// Duty: typed identifiers, their text forms, and the version arithmetic every
// floor relies on. Floor: F0. It does not allocate identifiers (meta/state
// does) and knows nothing of how they travel (proto/wire does).
package ids

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// BlockSize is the unit of checksum and version, in bytes: one block is one
// atomic register.
const BlockSize = 4096

// DefaultChunkBytes is the size of a chunk unless a volume says otherwise.
const DefaultChunkBytes = 64 << 20

// VolumeID names a volume for ever; ids are never reused. 0 is no volume.
type VolumeID uint64

// ChunkID names a chunk for ever. It is not the chunk's index in its volume:
// a volume that shrinks and grows again gets new ids for the same indices.
// 0 is no chunk.
type ChunkID uint64

// ChunkIndex is a chunk's place in its volume: byte offset / chunk size.
type ChunkIndex uint32

// LayerID names a layer of a chunk: the writable top or an immutable
// snapshot. 0 is the layer every volume begins with.
type LayerID uint32

// Block is a block's place in its chunk: byte offset in the chunk / BlockSize.
type Block uint32

// Epoch is a volume's writer epoch; only a Raft commit changes it. 0 is the
// epoch of a volume nobody has attached yet.
type Epoch uint32

// Revision is a volume's membership revision; only a Raft commit changes it.
type Revision uint64

// Incarnation counts the lives of a store's identity. A store formatted anew
// or restored from a copy has another one.
type Incarnation uint64

// StoreID is a store's random identity, written into its superblock.
type StoreID [16]byte

// NewStoreID returns a random identity.
func NewStoreID() StoreID {
	var id StoreID
	_, _ = rand.Read(id[:]) // crypto/rand.Read never fails (Go 1.24)
	return id
}

// String returns the 32 hexadecimal digits of the id.
func (id StoreID) String() string { return hex.EncodeToString(id[:]) }

// Short returns the first 8 hexadecimal digits, for tables.
func (id StoreID) Short() string { return hex.EncodeToString(id[:4]) }

// IsZero reports whether the id names no store.
func (id StoreID) IsZero() bool { return id == StoreID{} }

// ParseStoreID reads the form that String writes.
func ParseStoreID(s string) (StoreID, error) {
	var id StoreID
	if len(s) != 2*len(id) {
		return id, fmt.Errorf("store id %q: want %d hexadecimal digits", s, 2*len(id))
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return id, fmt.Errorf("store id %q: %w", s, err)
	}
	return id, nil
}

// StoreIDFromBytes reads the 16 raw bytes of an id.
func StoreIDFromBytes(b []byte) (StoreID, error) {
	var id StoreID
	if len(b) != len(id) {
		return id, fmt.Errorf("store id of %d bytes: want %d", len(b), len(id))
	}
	copy(id[:], b)
	return id, nil
}

// Version orders the writes of a volume: (writer epoch, counter), the epoch in
// the upper 24 bits, so that a newer writer's writes always win. 0 is the
// version of a block that was never written.
//
// The counter has 40 bits: 127 days at 100,000 writes a second, after which
// the gateway takes a new epoch.
type Version uint64

const counterBits = 40

// MaxCounter is the last counter of an epoch.
const MaxCounter = 1<<counterBits - 1

// MaxEpoch is the last epoch a volume can have.
const MaxEpoch = 1<<(64-counterBits) - 1

// MaxVersion is above every version a writer can give.
const MaxVersion = Version(1<<64 - 1)

// MakeVersion joins an epoch and a counter (≤ MaxCounter).
func MakeVersion(e Epoch, counter uint64) Version {
	return Version(uint64(e)<<counterBits | counter&MaxCounter)
}

// Epoch returns the writer epoch of v.
func (v Version) Epoch() Epoch { return Epoch(v >> counterBits) }

// Counter returns the place of v in its epoch.
func (v Version) Counter() uint64 { return uint64(v) & MaxCounter }

// String returns "epoch.counter".
func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Epoch(), v.Counter()) }
