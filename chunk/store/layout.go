package store

import (
	"bytes"
	"encoding/binary"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The disk, in blocks of 4 KiB (all integers little endian):
//
//	 0            1            2 … 15     16                16+S              16+2S
//	+------------+------------+----------+-----------------+-----------------+----
//	| superblock | its copy   | unused   | segment 0       | segment 1       | …
//	+------------+------------+----------+-----------------+-----------------+----
//
// A segment is S blocks, filled from its front by batches and never written
// over: it is given up as a whole.
//
//	+------+--------+--------+---------+---------+--------+---------+--------
//	| head | batch  | data 0 | data 1  | batch   | data 0 | batch   | unused
//	+------+--------+--------+---------+---------+--------+---------+--------
//
// A batch is one block of packed records, then the data blocks of those
// records in the same order. One write call carries many batches.
//
//	 0       4      8        16    24    32       40       48   52     54      56   58    60    64
//	+-------+------+--------+-----+-----+--------+--------+----+------+-------+----+-----+-----+---------+
//	| magic | life | store  | gen | LSN | durable| written| at |blocks|records|used|flags| crc | records |
//	+-------+------+--------+-----+-----+--------+--------+----+------+-------+----+-----+-----+---------+
//
// LSNs count batches, without a gap, over all segments. gen is the LSN of the
// segment's first batch and life counts the openings of the store: together
// they tell this use of a segment from an earlier one. at is the batch's own
// place, so that a copy of a batch inside somebody's data is never taken for
// one. durable and written are the highest LSNs known to survive a power loss,
// and a kill, when the batch was written: below them a missing batch is
// damage, above them it is a tail that was never promised. The checksum covers
// the whole block.
//
// A record is 40 bytes and a payload:
//
//	 0        8       16        24      28      32      36    37    38   40
//	+--------+-------+---------+-------+-------+-------+-----+-----+----+---------+
//	| volume | chunk | version | layer | block | count |kind |flags| 0  | payload |
//	+--------+-------+---------+-------+-------+-------+-----+-----+----+---------+
//
//	kind      fields                                            payload
//	data      a run of count blocks at version; flag 1 = its    count checksums
//	          data did not match its checksum when it was moved
//	zero      a run of tombstones at version                    -
//	hole      a run of blocks set back to never written         -
//	poison    a run of blocks with no good copy left            -
//	drop      volume and chunk (0: all) are forgotten           -
//	volume    version = floor, layer = epoch, flag 1 = intact   -
//	free      block = segment, version = its gen: given up      -
//	root      of a checkpoint: volume = version of its last     -
//	          batch of pages, chunk = from, version = sum of
//	          hashes, layer and block = pages (high, low)
//	clean     the store was closed; nothing follows             -
//	head      volume = incarnation, chunk = batches of the      boot id (count bytes)
//	          head, block = crc of all its table entries
//	segments  part of the table of segments in use              count × 24: segment u32, life u32, gen, last LSN u48, blocks used u16
//	volumes   part of the table of volumes                      count × 24: volume, epoch u32, flags u32, floor
//	drops     part of the table of forgotten chunks             count × 24: volume, chunk, LSN
//	layers    layer = highest id ever given, the living ones    count × 8: id u32, being merged into u32 (0: not)
//	living    part of the table of all volumes' layers          count × 24: volume, id u32, into u32, highest id
//	gaps      part of the table of damage already reported      count × 24: gen, first LSN, last LSN
//
// The head, a segment's first batches, repeats everything that is true of the
// store as a whole: so a segment can be given up without looking for what else
// it said.
//
// The head repeats the roots of the kept checkpoints too, as root records.
//
// Versions: 2 is this layout. 1 had no roots, and no blocks used in its table
// of segments; no release wrote it.
//
// Crash points: see docs/DATA.md.
const (
	formatVersion = 2
	blockBytes    = ids.BlockSize
	logStart      = 16 // block of segment 0

	superMagic = "CAIRNST1"
	batchMagic = 0x54414243 // "CBAT"

	batchFixed   = 64
	recordFixed  = 40
	tableEntry   = 24
	batchRoom    = blockBytes - batchFixed
	maxRun       = (batchRoom - recordFixed) / 4 // blocks of the largest data record
	maxBootBytes = 64
	maxCluster   = 128

	flagHead   = 1 // a batch of a segment's head
	flagIntact = 1 // of a volume record or table entry
	flagBad    = 1 // of a data record: its block was bad when it was moved here
)

// kind is what a record says; the first four are also the states of a block.
type kind uint8

const (
	kindHole   = kind(wire.EntryHole)
	kindData   = kind(wire.EntryData)
	kindZero   = kind(wire.EntryZero)
	kindPoison = kind(wire.EntryPoison)

	kindDrop     kind = 16
	kindVolume   kind = 17
	kindFree     kind = 18
	kindClean    kind = 19
	kindHead     kind = 20
	kindSegments kind = 21
	kindVolumes  kind = 22
	kindDrops    kind = 23
	kindGaps     kind = 24
	kindRoot     kind = 25

	kindLayers     kind = 26
	kindLayerTable kind = 27
)

var le = binary.LittleEndian

// super is the store's identity.
type super struct {
	ID          ids.StoreID
	Incarnation ids.Incarnation
	Cluster     string
	segBlocks   uint32
	segments    uint32
}

// encode returns one copy of the superblock:
//
//	magic 8 | version 4 | segment blocks 4 | segments 4 | id 16 | incarnation 8 | cluster length 4 | cluster … | crc 4
func (p *super) encode() []byte {
	b := make([]byte, 0, blockBytes)
	b = append(b, superMagic...)
	b = le.AppendUint32(b, formatVersion)
	b = le.AppendUint32(b, p.segBlocks)
	b = le.AppendUint32(b, p.segments)
	b = append(b, p.ID[:]...)
	b = le.AppendUint64(b, uint64(p.Incarnation))
	b = le.AppendUint32(b, uint32(len(p.Cluster)))
	b = append(b, p.Cluster...)
	b = b[:blockBytes]
	le.PutUint32(b[blockBytes-4:], wire.Checksum(b[:blockBytes-4]))
	return b
}

// decodeSuper reads one copy. NotFound: there is no store here; Corrupt: there
// was one.
func decodeSuper(b []byte) (*super, error) {
	if !bytes.Equal(b[:8], []byte(superMagic)) {
		return nil, status.Errorf(status.NotFound, "the disk holds no cairn store: format it first")
	}
	if le.Uint32(b[blockBytes-4:]) != wire.Checksum(b[:blockBytes-4]) {
		return nil, status.Errorf(status.Corrupt, "the superblock is damaged")
	}
	if v := le.Uint32(b[8:]); v != formatVersion {
		return nil, status.Errorf(status.Unsupported, "the store has format version %d, this program knows %d: use the program that wrote it", v, formatVersion)
	}
	p := &super{segBlocks: le.Uint32(b[12:]), segments: le.Uint32(b[16:]), Incarnation: ids.Incarnation(le.Uint64(b[36:]))}
	copy(p.ID[:], b[20:36])
	n := le.Uint32(b[44:])
	if n > maxCluster {
		return nil, status.Errorf(status.Corrupt, "the superblock is damaged: its cluster name has %d bytes", n)
	}
	p.Cluster = string(b[48 : 48+n])
	return p, nil
}

// mark tells batches of this store from those of an earlier one on this disk.
func (p *super) mark() uint64 { return le.Uint64(p.ID[:]) ^ le.Uint64(p.ID[8:]) }

// batchHead is the fixed part of a batch's first block.
type batchHead struct {
	life    uint32
	mark    uint64
	gen     uint64
	lsn     uint64
	durable uint64
	written uint64
	at      uint32 // block of the disk
	blocks  uint16 // data blocks that follow
	records uint16
	used    uint16 // bytes of records
	flags   uint16
}

// begin writes what is known when a batch begins.
func (h *batchHead) begin(b []byte) {
	le.PutUint32(b[0:], batchMagic)
	le.PutUint32(b[4:], h.life)
	le.PutUint64(b[8:], h.mark)
	le.PutUint64(b[16:], h.gen)
	le.PutUint64(b[24:], h.lsn)
	le.PutUint32(b[48:], h.at)
}

// end writes what is known when no record is added any more.
func (h *batchHead) end(b []byte) {
	le.PutUint16(b[52:], h.blocks)
	le.PutUint16(b[54:], h.records)
	le.PutUint16(b[56:], h.used)
	le.PutUint16(b[58:], h.flags)
	clear(b[batchFixed+int(h.used) : blockBytes])
}

// finish writes what is known when the batch goes to the disk.
func finishBatch(b []byte, durable, written uint64) {
	le.PutUint64(b[32:], durable)
	le.PutUint64(b[40:], written)
	le.PutUint32(b[60:], batchSum(b))
}

func batchSum(b []byte) uint32 {
	return wire.Checksum(b[:60]) ^ wire.Checksum(b[64:blockBytes])*0x9e3779b1
}

// parseBatch decodes and checks a batch's first block, records included: what
// it lets through needs no further check of lengths.
func parseBatch(b []byte) (batchHead, bool) {
	if len(b) < blockBytes || le.Uint32(b) != batchMagic || le.Uint32(b[60:]) != batchSum(b) {
		return batchHead{}, false
	}
	h := batchHead{life: le.Uint32(b[4:]), mark: le.Uint64(b[8:]), gen: le.Uint64(b[16:]), lsn: le.Uint64(b[24:]),
		durable: le.Uint64(b[32:]), written: le.Uint64(b[40:]), at: le.Uint32(b[48:]), blocks: le.Uint16(b[52:]),
		records: le.Uint16(b[54:]), used: le.Uint16(b[56:]), flags: le.Uint16(b[58:])}
	if int(h.used) > batchRoom || h.lsn < h.gen || h.lsn == 0 || h.durable > h.lsn || h.written > h.lsn {
		return batchHead{}, false
	}
	data, n := uint32(0), uint16(0)
	rest := b[batchFixed : batchFixed+int(h.used)]
	for len(rest) > 0 {
		r, next, ok := parseRecord(rest)
		if !ok {
			return batchHead{}, false
		}
		if r.kind == kindData {
			data += r.count
		}
		rest = next
		n++
	}
	return h, data == uint32(h.blocks) && n == h.records
}

// record is one decoded record; payload is a part of the batch's block.
type record struct {
	volume  uint64
	chunk   uint64
	version uint64
	layer   uint32
	block   uint32
	count   uint32
	kind    kind
	flags   uint8
	payload []byte
}

// encode writes the fixed part and returns where the payload goes.
func (r *record) encode(b []byte) []byte {
	le.PutUint64(b[0:], r.volume)
	le.PutUint64(b[8:], r.chunk)
	le.PutUint64(b[16:], r.version)
	le.PutUint32(b[24:], r.layer)
	le.PutUint32(b[28:], r.block)
	le.PutUint32(b[32:], r.count)
	b[36], b[37], b[38], b[39] = byte(r.kind), r.flags, 0, 0
	return b[recordFixed:]
}

// parseRecord decodes the first record of b and returns what follows it.
func parseRecord(b []byte) (r record, rest []byte, ok bool) {
	if len(b) < recordFixed {
		return r, nil, false
	}
	r = record{volume: le.Uint64(b), chunk: le.Uint64(b[8:]), version: le.Uint64(b[16:]), layer: le.Uint32(b[24:]),
		block: le.Uint32(b[28:]), count: le.Uint32(b[32:]), kind: kind(b[36]), flags: b[37]}
	if r.count > maxChunkBlocks {
		return r, nil, false
	}
	size := 0
	switch r.kind {
	case kindData:
		size = 4 * int(r.count)
	case kindHead:
		size = int(r.count)
		if size > maxBootBytes {
			return r, nil, false
		}
	case kindSegments, kindVolumes, kindDrops, kindGaps, kindLayerTable:
		size = tableEntry * int(r.count)
	case kindLayers:
		size = markBytes * int(r.count)
	case kindHole, kindZero, kindPoison, kindDrop, kindVolume, kindFree, kindClean, kindRoot:
	default:
		return r, nil, false
	}
	if r.kind <= kindPoison && (r.count == 0 || uint64(r.block)+uint64(r.count) > maxChunkBlocks || r.volume == 0 || r.chunk == 0) {
		return r, nil, false
	}
	b = b[recordFixed:]
	if size > len(b) {
		return r, nil, false
	}
	r.payload = b[:size]
	return r, b[size:], true
}

// records calls f for each record of a parsed batch with the place of its
// first data block among the batch's.
func eachRecord(b []byte, h *batchHead, f func(r *record, data uint32) error) error {
	rest, data := b[batchFixed:batchFixed+int(h.used)], uint32(0)
	for len(rest) > 0 {
		r, next, ok := parseRecord(rest)
		if !ok {
			return status.Errorf(status.Internal, "a checked batch does not decode")
		}
		if err := f(&r, data); err != nil {
			return err
		}
		if r.kind == kindData {
			data += r.count
		}
		rest = next
	}
	return nil
}
