package store

import (
	"hash/crc32"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Pages keeps index pages that do not fit into memory, and past the process's
// end: checkpoints of the index are made of them. Nothing in it is believed
// without proof. A page carries a checksum over its content and identity, the
// store remembers the hash of each page it saved, and a checkpoint's root in
// the log has the sum over all of them: so Pages may lose keys, hold old ones
// or flip bits, and all that happens is that the store reads its log instead.
type Pages interface {
	// Save starts to keep a batch, at a version higher than any before. One
	// batch is in flight at a time; it belongs to Pages until done was called,
	// once, from any goroutine, possibly before Save returns. nil: it survives
	// a power loss. Called without the store's lock.
	Save(at uint64, batch []SavedPage, done func(error))
	// Get returns the newest version of one page; called under the store's
	// lock, once per page that is not in memory.
	Get(key []byte) ([]byte, error)
	// Load calls f for every key, with its newest version ≤ at (nil: none or
	// deleted); newer says that a version > at is there too. A key with
	// neither is left out. It returns the highest version there is.
	Load(at uint64, f func(p SavedPage, newer bool) error) (top uint64, err error)
	// Keep allows to forget what Load would not give for any version ≥ at. It
	// is called under the store's lock and waits for nothing.
	Keep(at uint64)
	// Wipe forgets everything.
	Wipe() error
}

// SavedPage is one page as Pages keeps it; Page nil deletes it.
type SavedPage struct{ Key, Page []byte }

// An encoded page:
//
//	 0      1     9                                                    end-4
//	+------+-----+----------------------------------------------------+-----+
//	| form | top | entries                                            | crc |
//	+------+-----+----------------------------------------------------+-----+
//
//	form 1   one entry for all blocks: version u64, place u32, sum u32, kind u8
//	form 2   128 versions u64, 128 places u32, 128 sums u32, 128 kinds u8
//
// The checksum covers the key too: a page from the wrong place fails.
const (
	formUniform = 1
	formFull    = 2

	pageFixed   = 1 + 8
	entryBytes  = 8 + 4 + 4 + 1
	uniformSize = pageFixed + entryBytes + 4
	fullSize    = pageFixed + pageBlocks*entryBytes + 4
	pageBytes   = pageBlocks * entryBytes // of a page in memory

	// SavedPageBytes bounds the size of an encoded page.
	SavedPageBytes = fullSize
	keyBytes       = 24
)

// key orders pages by volume, chunk, layer and place, in big endian.
func (p *page) key() []byte {
	b := make([]byte, 0, keyBytes)
	be := func(x uint64) {
		for i := 56; i >= 0; i -= 8 {
			b = append(b, byte(x>>i))
		}
	}
	be(uint64(p.c.v.id))
	be(uint64(p.c.id))
	be(uint64(p.c.layer)<<32 | uint64(p.n))
	return b
}

// pageKey is a decoded key.
type pageKey struct {
	volume ids.VolumeID
	chunk  ids.ChunkID
	layer  ids.LayerID
	n      uint32
}

func parseKey(b []byte) (k pageKey, ok bool) {
	if len(b) != keyBytes {
		return k, false
	}
	be := func(b []byte) (x uint64) {
		for _, c := range b[:8] {
			x = x<<8 | uint64(c)
		}
		return x
	}
	last := be(b[16:])
	k = pageKey{ids.VolumeID(be(b)), ids.ChunkID(be(b[8:])), ids.LayerID(last >> 32), uint32(last)}
	return k, k.volume != 0 && k.chunk != 0 && k.n < maxChunkBlocks/pageBlocks
}

// encode returns the page for Pages.
func (p *page) encode(key []byte) []byte {
	s := p.slots
	if s == nil {
		b := le.AppendUint64(append(make([]byte, 0, uniformSize), formUniform), uint64(p.top))
		b = le.AppendUint64(b, uint64(p.one.version))
		b = le.AppendUint32(b, p.one.loc)
		b = le.AppendUint32(b, p.one.sum)
		b = append(b, byte(p.one.kind))
		return le.AppendUint32(b, pageSum(key, b))
	}
	b := le.AppendUint64(append(make([]byte, 0, fullSize), formFull), uint64(p.top))
	for i := range s.version {
		b = le.AppendUint64(b, uint64(s.version[i]))
	}
	for i := range s.loc {
		b = le.AppendUint32(b, s.loc[i])
	}
	for i := range s.sum {
		b = le.AppendUint32(b, s.sum[i])
	}
	for i := range s.kind {
		b = append(b, byte(s.kind[i]))
	}
	return le.AppendUint32(b, pageSum(key, b))
}

func pageSum(key, b []byte) uint32 { return wire.Checksum(b) ^ wire.Checksum(key)*0x9e3779b1 }

// pageHash is a page's part in the sum of a checkpoint's root. mark is the
// store's.
func pageHash(mark uint64, key, page []byte) uint64 {
	h := uint64(wire.Checksum(page))<<32 | uint64(crc32.ChecksumIEEE(page))
	h ^= mark ^ (uint64(wire.Checksum(key))<<32|uint64(crc32.ChecksumIEEE(key)))*0x9e3779b97f4a7c15
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return h ^ h>>31
}

var errPage = status.Errorf(status.Corrupt, "an index page came back damaged or not at all: restart the store to rebuild its index from the log")

// decode fills p from an encoded page. blocks is the size of the disk: places
// beyond it are refused.
func (p *page) decode(key, b []byte, blocks uint32) error {
	if len(b) < uniformSize || le.Uint32(b[len(b)-4:]) != pageSum(key, b[:len(b)-4]) {
		return errPage
	}
	form, top := b[0], ids.Version(le.Uint64(b[1:]))
	good := func(loc uint32, k kind) bool {
		return k <= kindPoison && (loc == 0 && k != kindData || loc >= logStart && loc < blocks)
	}
	b = b[pageFixed:]
	if form == formUniform && len(b) == entryBytes+4 {
		e := entry{version: ids.Version(le.Uint64(b)), loc: le.Uint32(b[8:]), sum: le.Uint32(b[12:]), kind: kind(b[16])}
		if !good(e.loc, e.kind) || e.kind == kindData {
			return errPage
		}
		p.one, p.slots, p.top = e, nil, top
		return nil
	}
	if form != formFull || len(b) != pageBlocks*entryBytes+4 {
		return errPage
	}
	s := &slots{}
	for i := range s.version {
		s.version[i] = ids.Version(le.Uint64(b[8*i:]))
	}
	b = b[8*pageBlocks:]
	for i := range s.loc {
		s.loc[i] = le.Uint32(b[4*i:])
	}
	b = b[4*pageBlocks:]
	for i := range s.sum {
		s.sum[i] = le.Uint32(b[4*i:])
	}
	b = b[4*pageBlocks:]
	for i := range s.kind {
		s.kind[i] = kind(b[i])
		if !good(s.loc[i], s.kind[i]) {
			return errPage
		}
	}
	p.slots, p.top = s, top
	return nil
}
