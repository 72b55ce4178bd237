// Package wire is the data protocol between a gateway and a chunk server:
// framed binary requests and replies over one byte stream.
//
// Duty: message types, their bytes, their limits, and the block checksum that
// travels end to end. Floor: F0. It opens no sockets (netplane/link does) and
// decides nothing (chunk/volume and chunk/store do).
//
// # Frame
//
//	 0       4     5     6       8               16         20         24        28        32
//	+-------+-----+-----+-------+---------------+----------+----------+---------+---------+
//	| magic | ver | kind| flags | id            | body len | data len | body crc| head crc|
//	+-------+-----+-----+-------+---------------+----------+----------+---------+---------+
//	| body (body len bytes: fixed part, then sums / digests / entries / detail)            |
//	| data (data len bytes: whole blocks)                                                  |
//
// All integers are little endian. The header checksum is last so that a length
// is never believed before its checksum was; the body has its own; data is
// covered by the block checksums in the body, made once at the gateway and
// kept with the block for ever (BlockSum), so it has none of its own here.
//
// # Versions
//
//	1  this layout; a chain behind the entries came later, and older servers
//	   refuse frames with one
package wire

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// Version is the protocol version spoken here.
const Version = 1

// HeaderBytes is the size of a frame header.
const HeaderBytes = 32

// Limits of one frame, checked before anything is allocated.
const (
	MaxBody    = 2 << 20 // bytes
	MaxData    = 4 << 20 // bytes
	MaxEntries = MaxBody/entryBytes - 8
	// MaxLives bounds the digests of a list of lives: two for each chunk.
	MaxLives = MaxBody / 16
	// MaxIO is the largest read or write of one frame, in blocks.
	MaxIO = MaxData / ids.BlockSize
	// MaxLayers bounds the layers of a volume, and so of a read's chain.
	MaxLayers = 60
)

// Kind is what a frame asks for. A reply has its request's kind.
type Kind uint8

// The requests. "Fenced" below means: refused with status.Fenced when
// Request.Epoch is below the epoch the store has sealed for the volume.
const (
	// Hello opens a connection: Version = highest protocol version,
	// Data = cluster id. Nothing else is served before it.
	Hello Kind = 1
	// Ping asks for an empty reply.
	Ping Kind = 2
	// Write stores Count blocks from Block on, at Version, with Sums and Data.
	// A block whose stored version is higher stays as it is. Fenced.
	// Answered when accepted: it survives a kill of the process, not yet a
	// power loss.
	Write Kind = 3
	// Zero makes Count blocks from Block on read as zeros at Version
	// (tombstones; TRIM and WRITE_ZEROES). Otherwise like Write.
	Zero Kind = 4
	// Flush makes everything this store answered earlier durable, and logs
	// Floor for the volume. Fenced.
	Flush Kind = 5
	// Read returns Count blocks from Block on, each from the first of Layer and
	// the layers of Chain that has an entry for it (a tombstone is one); blocks
	// none has read as zeros. NotFound if one of the layers is gone, or is being
	// merged into one that does not stand before it. With FlagEntries the reply
	// says layer, version, kind and checksum of each block (holes included).
	// Fenced, unless FlagFrozen.
	Read Kind = 6
	// Seal raises the volume's epoch to Epoch, durably, and answers after all
	// earlier appends are finished: Reply.Version = highest version held,
	// Floor = highest floor logged, Incarnation, FlagIntact = nothing accepted
	// since Floor was lost. Fenced when Epoch is below the sealed epoch; equal
	// is accepted (idempotent), unless Count, which numbers the connections of
	// the epoch's writer, is below that of a seal that came before: Unavailable.
	Seal Kind = 7
	// Newer lists entries of the volume with version > Version, in order of
	// (chunk, layer, block) from (Chunk, Layer, Block) on, at most Count of
	// them (0: as many as fit). FlagMore: ask again after the last. Fenced.
	Newer Kind = 8
	// Digest returns one digest per DigestBlocks blocks of Chunk (Count = blocks
	// of the chunk) over the entries with version < Limit. Fenced.
	Digest Kind = 9
	// List returns the entries of Chunk in [Block, Block+Count). Fenced, unless
	// FlagFrozen; then with Chunk = 0 it returns in Digests the volume's chunks,
	// each followed by the life of the copy here (an older server: none).
	List Kind = 10
	// Install gives blocks of Chunk exactly the state of Entries (data, zero or
	// hole; Data holds the blocks of EntryData in order) wherever the stored
	// version is below Limit, even if that means an older version or a hole.
	// Fenced.
	Install Kind = 11
	// Drop forgets Chunk, or with Chunk = 0 the whole volume, for good. A chunk
	// may be brought back with other content, when a copy of it moves here again.
	// Epoch must be at or above the sealed epoch.
	Drop Kind = 12
	// Stat returns the epoch the volume is sealed at in Reply.Epoch (an older
	// server: 0) and its live blocks in Reply.Count64 (all volumes and the store's
	// totals have their own calls in chunk/store). Fenced.
	Stat Kind = 13
	// Settle tells a store that the volume's in-sync members were made equal and
	// durable under Epoch with Floor: from here on it is intact again. Durable
	// when answered. Fenced.
	Settle Kind = 14
	// Layers tells what layers of the volume there are: Layer is the highest id
	// ever given, Entries name the layers that live (Layer; Kind = EntryZero: it
	// is being merged into Block). Any other up to Layer is dropped, for good.
	// Layers only ever go, so it may come from anybody, late and again: not fenced.
	Layers Kind = 15
	// Merge gives Chunk's entries of Layer to the layer it is being merged into,
	// wherever that has none, at their versions. Durable in the order of the log.
	// Answered when Layer holds nothing of Chunk any more. Fenced.
	Merge Kind = 16
	// Damaged lists blocks of the volume that the store has found it cannot read,
	// at most Count (0: all). A good copy replaces them: Install with FlagRepair.
	// Fenced.
	Damaged   Kind = 17
	kindCount Kind = 18
)

// Frame flags.
const (
	FlagReply   uint16 = 1 << 0 // this frame is a reply
	FlagEntries uint16 = 1 << 1 // Read: return entries too
	FlagMore    uint16 = 1 << 2 // Newer reply: the list was cut
	FlagIntact  uint16 = 1 << 3 // Seal reply: nothing accepted was lost
	FlagRepair  uint16 = 1 << 4 // Install: rewrite a bad block at its own version
	// FlagFrozen says, of a Read or List, that nothing is written to its layers
	// any more: it needs no seal and is not fenced. Reply.Incarnation tells whose
	// data it is, and of a Read Reply.Count64 which life of the copy it is from: a
	// number that no later copy of the chunk has here while the connection lasts
	// (an older server: 0). NotFound, with Count64 = 1, if the store has nothing of
	// the chunk.
	FlagFrozen uint16 = 1 << 5
	// FlagRaw says, of a Read without a chain, that the layer's own entries are
	// wanted, even while it is being merged: for copying between replicas.
	FlagRaw uint16 = 1 << 6
	// FlagNoData says, of a Read with FlagEntries, that the entries are all that
	// is wanted: no data is read or sent, and a block without a good copy is no
	// error. A store that does not know it sends the data too.
	FlagNoData uint16 = 1 << 7
	// FlagFilled says, of a Digest or List, that the copy asked is being filled:
	// a chunk that was dropped here is empty then. Of any other copy that is
	// NotFound: it has moved away, and says nothing of what the chunk holds.
	FlagFilled uint16 = 1 << 8
)

// DigestBlocks is the range of one digest: 4 MiB.
const DigestBlocks = 1024

// EntryKind is the state of a block.
type EntryKind uint8

// The states of a block.
const (
	EntryHole   EntryKind = 0 // never written
	EntryData   EntryKind = 1
	EntryZero   EntryKind = 2 // tombstone: trimmed or zeroed at Version
	EntryPoison EntryKind = 3 // no good copy left; reads fail until overwritten
)

// Entry is the state of one block of one chunk.
type Entry struct {
	Chunk   ids.ChunkID
	Version ids.Version
	Layer   ids.LayerID
	Block   ids.Block
	Sum     uint32 // BlockSum of an EntryData
	Kind    EntryKind
}

// Request is one request. Which fields count depends on Kind.
type Request struct {
	Kind    Kind
	Flags   uint16
	ID      uint64 // chosen by the sender; unique on its connection while in flight
	Store   ids.StoreID
	Volume  ids.VolumeID
	Chunk   ids.ChunkID
	Layer   ids.LayerID
	Epoch   ids.Epoch
	Block   ids.Block
	Count   uint32 // blocks or entries
	Version ids.Version
	Floor   ids.Version
	Limit   ids.Version
	Sums    []uint32 // Write: one per block
	Entries []Entry  // Install, Layers
	// Chain is where a Read goes on for what Layer does not have: newest first,
	// descending ids. Not copied: it must not change while the request is out.
	Chain []ids.LayerID
	Data  []byte // Write, Install: whole blocks; owned by the receiver until it replies

	// Into, if long enough, receives a Read's data, and Reply.Data is a slice
	// of it. It does not travel.
	Into []byte
}

// Reply answers the request with the same ID.
type Reply struct {
	Kind        Kind
	Flags       uint16
	Status      status.Kind
	ID          uint64
	Epoch       ids.Epoch // Fenced, Stat: the sealed epoch
	Block       ids.Block // Corrupt, Poison: the first bad block
	Count64     uint64
	Version     ids.Version
	Floor       ids.Version
	Incarnation ids.Incarnation
	Took        uint64 // µs from the request's arrival at the chunk server to this reply; 0: not told
	Digests     []uint64
	Entries     []Entry
	Detail      string // one sentence when Status is not OK
	Data        []byte // Read: Count blocks
}

// Err returns the reply's status as an error; nil when OK.
func (r *Reply) Err() error { return status.New(r.Status, r.Detail) }

// Sink takes replies, in batches, in any order, from any goroutine, possibly
// before the Submit that caused them has returned. It must not block.
type Sink interface {
	Replies(rs []*Reply)
}

// Fail answers each request with the same status.
func Fail(sink Sink, reqs []*Request, k status.Kind, detail string) {
	out := make([]*Reply, len(reqs))
	for i, q := range reqs {
		out[i] = &Reply{Kind: q.Kind, ID: q.ID, Status: k, Detail: detail}
	}
	sink.Replies(out)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum returns the CRC-32C (Castagnoli) of b.
func Checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// BlockSum returns the end-to-end checksum of one block: CRC-32C over the data
// (BlockSize bytes) followed by its identity, so that a block at the wrong
// place, or of the wrong time, fails too.
func BlockSum(v ids.VolumeID, c ids.ChunkID, l ids.LayerID, b ids.Block, ver ids.Version, data []byte) uint32 {
	var id [32]byte
	binary.LittleEndian.PutUint64(id[0:], uint64(v))
	binary.LittleEndian.PutUint64(id[8:], uint64(c))
	binary.LittleEndian.PutUint64(id[16:], uint64(ver))
	binary.LittleEndian.PutUint32(id[24:], uint32(l))
	binary.LittleEndian.PutUint32(id[28:], uint32(b))
	return crc32.Update(crc32.Checksum(data, castagnoli), castagnoli, id[:])
}

// EntryDigest hashes one entry for Digest replies, which are the wrapping sum
// of these over a range: order-free. (splitmix64 steps, after Steele, Lea and
// Flood, "Fast splittable pseudorandom number generators", 2014.)
func EntryDigest(e Entry) uint64 {
	h := mix(uint64(e.Version) + 0x9e3779b97f4a7c15)
	h = mix(h ^ uint64(e.Layer)<<32 ^ uint64(e.Block))
	return mix(h ^ uint64(e.Sum)<<8 ^ uint64(e.Kind))
}

func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// String returns the kind's name.
func (k Kind) String() string {
	names := [...]string{"?", "hello", "ping", "write", "zero", "flush", "read", "seal", "newer", "digest",
		"list", "install", "drop", "stat", "settle", "layers", "merge", "damaged"}
	if int(k) < len(names) {
		return names[k]
	}
	return "?"
}
