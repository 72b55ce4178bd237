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
)

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
// away (the entries are in Pages only).
type page struct {
	c     *chunk
	n     uint32 // block / pageBlocks
	slots *slots
	one   entry       // uniform: every entry (never data)
	top   ids.Version // ≥ every version in the page
	hash  uint64      // of what was saved last, if known
	away  bool
	known bool // Pages was given it, and has not been told to delete it
	clean bool // Pages has the entries as they are
	queue bool // it is in the queue of what is to be saved
	dead  bool // dropped
	used  bool // touched since the clock hand passed
}

// chunk is one layer of one chunk of a volume.
type chunk struct {
	v     *vol
	id    ids.ChunkID
	layer ids.LayerID
	pages []*page // by n; nil: nothing was ever written there

	ragged bool // it is on the straightener's list
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
	order  []*chunk               // sorted by (id, layer)
	last   *chunk                 // the last one asked for
	lives  map[ids.ChunkID]uint64 // of those that a frozen request has asked for (Store.lifeOf)
	sealer wire.Sink              // the connection that sealed it last; nil: none since the store was opened
	sealed uint32                 // its number among those of epoch's writer

	lastLayer ids.LayerID // highest id ever told
	marks     []layerMark // the layers that live, of those up to lastLayer; none: not told
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

// index bounds the pages in memory: len(ring)·pageBytes goes below limit as
// soon as pages are saved, and no change is admitted while it is a quarter
// above. Without Pages all of it stays in memory.
//
// A changed page is queued once; take makes a batch of the oldest, saved ends
// it. count and sum say what Pages holds once the batch in flight is saved.
type index struct {
	limit  int64
	pages  Pages
	mark   uint64  // the store's
	blocks uint32  // of the disk
	ring   []*page // the resident pages, in clock order
	hand   int
	misses uint64 // pages fetched

	queue  []*page // changed since they were saved, oldest change first
	gone   []gone  // dropped, to be deleted; before any page of queue
	batch  []*page // in flight
	swept  []gone  // likewise
	busy   bool
	broken error  // why the last batch could not be saved
	at     uint64 // version of the last batch
	count  uint64 // pages
	sum    uint64 // over their hashes

	pagesOut, goneOut uint64 // how many left queue and gone, ever
}

// gone is a page to be deleted from Pages; counted if count and sum have it.
type gone struct {
	key     []byte
	hash    uint64
	counted bool
}

// page returns page n of c, resident or uniform; nil when nothing is there and
// none is to be made.
func (x *index) page(c *chunk, n uint32, create bool) (*page, error) {
	if n >= uint32(len(c.pages)) || c.pages[n] == nil {
		if !create {
			return nil, nil
		}
		c.place(n)
		c.pages[n] = &page{c: c, n: n}
	}
	p := c.pages[n]
	p.used = true
	if !p.away {
		return p, nil
	}
	key := p.key()
	b, err := x.pages.Get(key)
	if err != nil {
		return nil, status.Errorf(status.IO, "fetch an index page: %w", err)
	}
	if pageHash(x.mark, key, b) != p.hash { // damaged, or an old one
		return nil, errPage
	}
	if err := p.decode(key, b, x.blocks); err != nil {
		return nil, err
	}
	p.away = false
	x.misses++
	x.ring = append(x.ring, p)
	return p, nil
}

// place makes room for page n.
func (c *chunk) place(n uint32) {
	for n >= uint32(len(c.pages)) {
		c.pages = append(c.pages, nil)
	}
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
	p.top = max(p.top, e.version)
	x.changed(p)
}

// fill makes the whole page one entry.
func (x *index) fill(p *page, e entry) {
	p.one, p.slots = e, nil // the clock drops it from the ring
	p.top = max(p.top, e.version)
	x.changed(p)
}

// changed queues a page to be saved.
func (x *index) changed(p *page) {
	p.clean = false
	if !p.queue && x.pages != nil {
		p.queue = true
		x.queue = append(x.queue, p)
	}
}

// drop forgets a page.
func (x *index) drop(p *page) {
	p.slots, p.dead = nil, true
	if p.known {
		x.gone = append(x.gone, gone{p.key(), p.hash, true})
	}
}

// over reports whether pages in memory are over the limit.
func (x *index) over() bool { return x.pages != nil && int64(len(x.ring))*pageBytes > x.limit }

// full reports whether changes have to wait until pages are saved.
func (x *index) full() bool {
	return x.pages != nil && int64(len(x.ring)-64)*pageBytes > x.limit+x.limit/4 && (x.busy || len(x.queue) > 0)
}

// trim takes saved pages the clock hand finds unused out of memory, until the
// rest fits or the hand has moved on by steps. It runs between requests, so
// that no page leaves while one is being worked on.
func (x *index) trim(steps int) {
	if x.pages == nil {
		x.compact()
		return
	}
	for ; steps > 0 && int64(len(x.ring))*pageBytes > x.limit; steps-- {
		x.hand %= len(x.ring)
		p := x.ring[x.hand]
		switch {
		case p.slots == nil: // uniform or forgotten meanwhile
		case p.used, !p.clean:
			p.used = false
			x.hand++
			continue
		default:
			p.slots, p.away = nil, true
		}
		last := len(x.ring) - 1
		x.ring[x.hand] = x.ring[last]
		x.ring[last] = nil
		x.ring = x.ring[:last]
	}
}

// trimSteps is how far the clock hand moves after a request.
const trimSteps = 256

// round is as many steps as find every page that can leave.
func (x *index) round() int { return 2*len(x.ring) + 1 }

// compact forgets pages that are not resident any more once they are many;
// without Pages nothing else takes them out of the ring.
func (x *index) compact() {
	if x.hand++; x.hand > 2*len(x.ring)+64 {
		x.hand = 0
		x.ring = slices.DeleteFunc(x.ring, func(p *page) bool { return p.slots == nil })
	}
}

// take makes the next batch, of at most n pages, and gives it a version. Pages
// to be deleted come first and alone: one of the same name may come back.
func (x *index) take(n int) []SavedPage {
	batch := make([]SavedPage, 0, min(n, max(len(x.gone), len(x.queue))))
	x.batch, x.swept = x.batch[:0], nil
	if m := min(n, len(x.gone)); m > 0 {
		x.swept, x.gone = x.gone[:m:m], x.gone[m:]
		x.goneOut += uint64(m)
		for _, g := range x.swept {
			if g.counted {
				x.sum -= g.hash
				x.count--
			}
			batch = append(batch, SavedPage{Key: g.key})
		}
	}
	for len(x.swept) == 0 && len(x.queue) > 0 && len(batch) < n {
		p := x.queue[0]
		x.queue[0] = nil
		x.queue = x.queue[1:]
		x.pagesOut++
		p.queue = false
		if !p.dead {
			batch = append(batch, x.encode(p))
		}
	}
	x.busy = true
	x.at++
	return batch
}

func (x *index) encode(p *page) SavedPage {
	key := p.key()
	s := SavedPage{key, p.encode(key)}
	if p.known {
		x.sum -= p.hash
		x.count--
	}
	p.hash, p.known = pageHash(x.mark, s.Key, s.Page), true
	x.sum += p.hash
	x.count++
	x.batch = append(x.batch, p)
	return s
}

// saved ends the batch in flight. What could not be saved is queued again.
func (x *index) saved(err error) {
	x.busy, x.broken = false, err
	if err != nil {
		for i := range x.swept {
			x.swept[i].counted = false
		}
		x.gone = append(x.swept, x.gone...)
	}
	for i, p := range x.batch {
		if p.clean = err == nil && !p.queue; err != nil && !p.dead {
			x.changed(p)
		}
		x.batch[i] = nil
	}
	x.swept = nil
}
