package store

import (
	"bytes"
	"cmp"
	"slices"
	"sync"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// scanWindow is how much recovery reads at once; hopWindow where it hops from
// one batch to the next and hopBlocks or more of data lie between.
const (
	scanWindow = 256 << 10
	hopWindow  = 8 << 10
	hopBlocks  = 12
)

// window reads blocks one after the other with large calls.
type window struct {
	d     disk.Disk
	buf   []byte
	first uint32 // block of the disk in buf[0:]
	count uint32
	hops  bool // what comes next is far from what came last
}

// windowBuffers are reused: a host opens several stores.
var windowBuffers = sync.Pool{New: func() any { b := make([]byte, scanWindow); return &b }}

// release gives the buffer back.
func (w *window) release() {
	if w.buf != nil {
		b := w.buf
		windowBuffers.Put(&b)
		w.buf, w.count = nil, 0
	}
}

// block returns one block; end is the first block beyond what may be read
// ahead. A block the disk cannot give is nil.
func (w *window) block(at, end uint32) []byte {
	if at < w.first || at >= w.first+w.count {
		if w.buf == nil {
			w.buf = *windowBuffers.Get().(*[]byte)
		}
		w.first, w.count = at, min(end-at, scanWindow/blockBytes)
		if w.hops {
			w.count = min(w.count, hopWindow/blockBytes)
		}
		if disk.ReadAt(w.d, w.buf[:w.count*blockBytes], offset(at)) != nil {
			w.count = 1
			if disk.ReadAt(w.d, w.buf[:blockBytes], offset(at)) != nil {
				w.count = 0
				return nil // missing, as far as recovery is concerned
			}
		}
	}
	i := (at - w.first) * blockBytes
	return w.buf[i : i+blockBytes]
}

// use is one use of a segment that recovery found: its head is there (headed)
// or only batches behind it.
type use struct {
	seg    *segment
	gen    uint64
	life   uint32
	last   uint64 // LSN of its last batch if known from a later head, else 0
	tail   uint32 // blocks it uses, likewise
	headed bool
}

// head is a segment's decoded and complete head.
type head struct {
	use
	boot        string
	incarnation ids.Incarnation
	segments    map[uint32]use // by number
	volumes     []record
	drops       map[dropKey]uint64
	gaps        []gap
	roots       []root
	layers      []volumeLayers
	beyond      bool // it names what this disk does not have
}

// volumeLayers is what a head says of a volume's layers.
type volumeLayers struct {
	id    ids.VolumeID
	last  ids.LayerID
	marks []layerMark
}

// valid parses the block at a place of a segment.
func (s *Store) valid(w *window, g *segment, at uint32) (batchHead, []byte, bool) {
	b := w.block(s.base(g)+at, s.base(g)+s.super.segBlocks)
	if b == nil {
		return batchHead{}, nil, false
	}
	h, ok := parseBatch(b)
	if !ok || h.mark != s.super.mark() || h.at != s.base(g)+at || at+1+uint32(h.blocks) > s.super.segBlocks {
		return batchHead{}, nil, false
	}
	return h, b, true
}

// findUses looks at every segment's first block. Where that is neither empty
// nor a head, what follows may tell that one was there.
func (s *Store) findUses(w *window) []use {
	var uses []use
	for _, g := range s.segs {
		w.count = 0
		b := w.block(s.base(g), s.base(g)+2)
		second := w.block(s.base(g)+1, s.base(g)+2)
		g.stale = b == nil || second == nil || !empty(b) || !empty(second)
		h, _, ok := s.valid(w, g, 0)
		if ok && h.flags&flagHead != 0 && h.gen == h.lsn {
			uses = append(uses, use{seg: g, gen: h.gen, life: h.life, headed: true})
			continue
		}
		if !g.stale {
			continue
		}
		found := map[use]bool{}
		for at := uint32(1); at < s.super.segBlocks; at++ {
			if h, _, ok := s.valid(w, g, at); ok {
				found[use{seg: g, gen: h.gen, life: h.life}] = true
			}
		}
		var newest use
		for u := range found {
			if u.gen > newest.gen {
				newest = u
			}
		}
		if newest.gen > 0 {
			uses = append(uses, newest)
		}
	}
	slices.SortFunc(uses, func(a, b use) int { return cmp.Compare(a.gen, b.gen) })
	return uses
}

// zeros is what unused blocks hold.
var zeros [scanWindow]byte

func empty(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

// scan calls f for each batch of a use, in order. Where one is broken it looks
// for the next; LSNs only rise. It stops after the use's last batch.
func (s *Store) scan(w *window, u use, f func(h *batchHead, at uint32, b []byte) error) error {
	w.count = 0
	defer func() { w.hops = false }()
	lsn := uint64(0)
	for at := uint32(0); at < s.super.segBlocks; {
		h, b, ok := s.valid(w, u.seg, at)
		if !ok || h.gen != u.gen || h.life != u.life || h.lsn <= lsn {
			w.hops = false // step by step
			at++
			continue
		}
		lsn, w.hops = h.lsn, h.blocks >= hopBlocks
		if u.last > 0 && lsn > u.last {
			return nil
		}
		if err := f(&h, at, b); err != nil {
			return err
		}
		if lsn == u.last {
			return nil
		}
		at += 1 + uint32(h.blocks)
	}
	return nil
}

// readHead decodes a use's head; nil if any part of it is missing.
func (s *Store) readHead(w *window, u use) *head {
	if !u.headed {
		return nil
	}
	d := &head{use: u, segments: map[uint32]use{}, drops: map[dropKey]uint64{}}
	var parts, want uint64
	var sum, wantSum uint32
	err := s.scan(w, u, func(h *batchHead, _ uint32, b []byte) error {
		if h.lsn != u.gen+parts || h.flags&flagHead == 0 {
			return errDone
		}
		parts++
		if err := eachRecord(b, h, func(r *record, _ uint32) error {
			switch r.kind {
			case kindHead:
				want, wantSum = r.chunk, r.block
				d.incarnation, d.boot = ids.Incarnation(r.volume), string(r.payload)
			case kindSegments, kindVolumes, kindDrops, kindGaps, kindLayerTable:
				sum = tableSum(sum, r.kind, r.payload)
				s.addTable(d, r)
			case kindRoot:
				sum = rootSum(sum, r)
				d.roots = append(d.roots, rootOf(r))
			}
			return nil
		}); err != nil {
			return err
		}
		if parts == want {
			return errDone
		}
		return nil
	})
	if err != errDone || want == 0 || parts != want || sum != wantSum {
		return nil
	}
	return d
}

// addTable enters one table record.
func (s *Store) addTable(d *head, r *record) {
	tableEntries(r.payload, func(a, b, c uint64) {
		switch r.kind {
		case kindSegments:
			n, tail := uint32(a), uint32(c>>lastBits)
			if d.beyond = d.beyond || n >= uint32(len(s.segs)) || tail > s.super.segBlocks; !d.beyond {
				d.segments[n] = use{seg: s.segs[n], gen: b, life: uint32(a >> 32), last: c & (1<<lastBits - 1), tail: tail, headed: true}
			}
		case kindVolumes:
			d.volumes = append(d.volumes, record{kind: kindVolume, volume: a, layer: uint32(b), flags: uint8(b >> 32), version: c})
		case kindDrops:
			d.drops[dropKey{ids.VolumeID(a), ids.ChunkID(b)}] = c
		case kindLayerTable:
			if n := len(d.layers); n == 0 || d.layers[n-1].id != ids.VolumeID(a) {
				d.layers = append(d.layers, volumeLayers{id: ids.VolumeID(a), last: ids.LayerID(c)})
			}
			l := &d.layers[len(d.layers)-1]
			l.marks = append(l.marks, layerMark{ids.LayerID(b), ids.LayerID(b >> 32)})
		case kindGaps:
			d.gaps = append(d.gaps, gap{a, b, c})
		}
	})
}

// intactData reports whether every data block of a batch has its checksum.
func (s *Store) intactData(w *window, g *segment, at uint32, b []byte, h *batchHead) bool {
	head := slices.Clone(b) // the window moves on
	ok := true
	err := eachRecord(head, h, func(r *record, data uint32) error {
		if r.kind != kindData || r.flags&flagBad != 0 {
			return nil
		}
		for i := range r.count {
			b := w.block(s.base(g)+at+1+data+i, s.base(g)+s.super.segBlocks)
			ok = ok && b != nil && wire.BlockSum(ids.VolumeID(r.volume), ids.ChunkID(r.chunk), ids.LayerID(r.layer),
				ids.Block(r.block+i), ids.Version(r.version), b) == le.Uint32(r.payload[4*i:])
		}
		return nil
	})
	return ok && err == nil
}
