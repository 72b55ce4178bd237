package store

import (
	"cmp"
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

const (
	// maxChunkBlocks bounds a chunk: 1 GiB.
	maxChunkBlocks = 1 << 18
	pageBlocks     = 128
	pageBytes      = pageBlocks * (8 + 4 + 4 + 1)
	pageEncoded    = pageBytes + 4

	// SpillPageBytes is the size of every page a Spill is given.
	SpillPageBytes = pageEncoded
)

// Spill keeps index pages that do not fit into memory. It is a scratch pad:
// nothing in it outlives the store's closing, the log rebuilds the index. Its
// calls run under the store's lock.
type Spill interface {
	// Wipe forgets everything; called once, by Open.
	Wipe() error
	// Put keeps a copy of page. Get returns the last one put under key.
	Put(key, page []byte) error
	Get(key []byte) ([]byte, error)
	Delete(key []byte) error
}

// entry is where the newest record of a block is.
type entry struct {
	version ids.Version
	loc     uint32 // block of the disk: the data, or the batch that holds the record; 0: never written
	sum     uint32
	kind    kind
}

// slots are the entries of one page, field by field to save the padding.
type slots struct {
	version [pageBlocks]ids.Version
	loc     [pageBlocks]uint32
	sum     [pageBlocks]uint32
	kind    [pageBlocks]kind
}

// page is the index of pageBlocks consecutive blocks. It is in one of three
// states: uniform (slots nil, all entries are one), resident (slots set) or
// spilled.
type page struct {
	c       *chunk
	n       uint32 // block / pageBlocks
	slots   *slots
	one     entry       // uniform: every entry (never data)
	top     ids.Version // ≥ every version in the page
	spilled bool        // the entries are in the Spill only
	copied  bool        // the Spill has the entries as they are
	used    bool        // touched since the clock hand passed
}

// chunk is one layer of one chunk of a volume.
type chunk struct {
	v     *vol
	id    ids.ChunkID
	layer ids.LayerID
	pages []*page // by n; nil: nothing was ever written there
}

// vol is what the store knows of a volume.
type vol struct {
	id     ids.VolumeID
	epoch  ids.Epoch   // sealed
	floor  ids.Version // highest told
	logged ids.Version // highest in the log, ≤ floor
	intact bool
	high   ids.Version // ≥ every version ever held
	live   uint64      // data blocks
	chunks map[chunkKey]*chunk
	order  []*chunk  // sorted by (id, layer)
	last   *chunk    // the last one asked for
	sealer wire.Sink // the connection that sealed it last; nil: none since the store was opened
	sealed uint32    // its number among those of epoch's writer
}

type chunkKey struct {
	id    ids.ChunkID
	layer ids.LayerID
}

func (c *chunk) compare(o chunkKey) int {
	return cmp.Or(cmp.Compare(c.id, o.id), cmp.Compare(c.layer, o.layer))
}

// chunk returns a chunk, made if it is to be; else nil if there is none.
func (v *vol) chunk(id ids.ChunkID, layer ids.LayerID, create bool) *chunk {
	if v.last != nil && v.last.id == id && v.last.layer == layer {
		return v.last
	}
	k := chunkKey{id, layer}
	c := v.chunks[k]
	if c == nil && create {
		c = &chunk{v: v, id: id, layer: layer}
		v.chunks[k] = c
		i, _ := slices.BinarySearchFunc(v.order, k, (*chunk).compare)
		v.order = slices.Insert(v.order, i, c)
	}
	if c != nil {
		v.last = c
	}
	return c
}

// forget takes chunks out of the volume.
func (v *vol) forget(match func(*chunk) bool) []*chunk {
	var gone []*chunk
	v.order = slices.DeleteFunc(v.order, func(c *chunk) bool {
		if !match(c) {
			return false
		}
		gone = append(gone, c)
		delete(v.chunks, chunkKey{c.id, c.layer})
		return true
	})
	v.last = nil
	return gone
}

// index bounds the pages in memory: 0 ≤ len(ring)·pageBytes ≤ limit after
// trim, when there is a Spill.
type index struct {
	limit int64
	spill Spill
	ring  []*page // the resident pages, in clock order
	hand  int
}

// page returns page n of c, resident or uniform; nil when nothing is there and
// none is to be made.
func (x *index) page(c *chunk, n uint32, create bool) (*page, error) {
	if n >= uint32(len(c.pages)) || c.pages[n] == nil {
		if !create {
			return nil, nil
		}
		for n >= uint32(len(c.pages)) {
			c.pages = append(c.pages, nil)
		}
		c.pages[n] = &page{c: c, n: n}
	}
	p := c.pages[n]
	p.used = true
	if !p.spilled {
		return p, nil
	}
	b, err := x.spill.Get(p.key())
	if err != nil {
		return nil, status.Errorf(status.IO, "read an index page from the spill: %w", err)
	}
	if err := p.decode(b); err != nil {
		return nil, err
	}
	p.spilled, p.copied = false, true
	x.ring = append(x.ring, p)
	return p, nil
}

// get returns the entry of one block.
func (x *index) get(c *chunk, b ids.Block) (entry, error) {
	p, err := x.page(c, uint32(b)/pageBlocks, false)
	if p == nil || err != nil {
		return entry{}, err
	}
	return p.at(uint32(b) % pageBlocks), nil
}

func (p *page) at(i uint32) entry {
	if p.slots == nil {
		return p.one
	}
	s := p.slots
	return entry{s.version[i], s.loc[i], s.sum[i], s.kind[i]}
}

// put sets one entry of a resident page.
func (s *slots) put(i uint32, e entry) {
	s.version[i], s.loc[i], s.sum[i], s.kind[i] = e.version, e.loc, e.sum, e.kind
}

// set changes entry i of p.
func (x *index) set(p *page, i uint32, e entry) {
	if p.slots == nil {
		p.slots = &slots{}
		for j := range uint32(pageBlocks) {
			p.slots.put(j, p.one)
		}
		x.ring = append(x.ring, p)
	}
	p.slots.put(i, e)
	p.copied = false
	p.top = max(p.top, e.version)
}

// fill makes the whole page one entry.
func (x *index) fill(p *page, e entry) {
	p.one, p.slots, p.copied = e, nil, false // the clock drops it from the ring
	p.top = max(p.top, e.version)
}

// trim spills pages the clock hand finds unused, until the rest fits. It runs
// between requests, so that no page leaves while one is being worked on.
func (x *index) trim() error {
	if x.spill == nil {
		x.compact()
		return nil
	}
	for int64(len(x.ring))*pageBytes > x.limit {
		x.hand %= len(x.ring)
		p := x.ring[x.hand]
		switch {
		case p.slots == nil: // uniform or forgotten meanwhile
		case p.used:
			p.used = false
			x.hand++
			continue
		default:
			if !p.copied {
				if err := x.spill.Put(p.key(), p.encode()); err != nil {
					return status.Errorf(status.IO, "put an index page into the spill: %w", err)
				}
			}
			p.slots, p.spilled, p.copied = nil, true, true
		}
		last := len(x.ring) - 1
		x.ring[x.hand] = x.ring[last]
		x.ring[last] = nil
		x.ring = x.ring[:last]
	}
	return nil
}

// compact forgets pages that are not resident any more once they are many;
// without a Spill nothing else takes them out of the ring.
func (x *index) compact() {
	if x.hand++; x.hand > 2*len(x.ring)+64 {
		x.hand = 0
		x.ring = slices.DeleteFunc(x.ring, func(p *page) bool { return p.slots == nil })
	}
}

// drop forgets a page and its copy.
func (x *index) drop(p *page) error {
	p.slots = nil
	if !p.copied {
		return nil
	}
	if err := x.spill.Delete(p.key()); err != nil {
		return status.Errorf(status.IO, "delete an index page from the spill: %w", err)
	}
	return nil
}

// key orders pages by volume, chunk, layer and place.
func (p *page) key() []byte {
	b := make([]byte, 0, 24)
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

// encode returns the page for the Spill: versions, places, sums, kinds, crc.
func (p *page) encode() []byte {
	b := make([]byte, 0, pageEncoded)
	s := p.slots
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
	return le.AppendUint32(b, p.sum(b))
}

// sum covers the page's identity too: a page from the wrong place fails.
func (p *page) sum(b []byte) uint32 { return wire.Checksum(b) ^ wire.Checksum(p.key())*0x9e3779b1 }

func (p *page) decode(b []byte) error {
	if len(b) != pageEncoded || le.Uint32(b[pageBytes:]) != p.sum(b[:pageBytes]) {
		return status.Errorf(status.Corrupt, "an index page came back damaged from the spill: restart the store to rebuild its index")
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
	}
	p.slots = s
	return nil
}
