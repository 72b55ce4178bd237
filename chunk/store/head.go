package store

import (
	"cmp"
	"maps"
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// writeHead begins the open segment with everything that is true of the whole
// store. Its first record says how many batches it takes and the checksum of
// its tables, so that parts of two attempts never make one head.
func (s *Store) writeHead() error {
	s.inHead = true
	defer func() { s.inHead = false }()
	info := record{kind: kindHead, volume: uint64(s.incarnation), count: uint32(len(s.cfg.BootID))}
	st, err := s.append(&info, len(s.cfg.BootID))
	if err != nil {
		return err
	}
	copy(st.payload, s.cfg.BootID)
	g, at := s.group, batchFixed // where info is: nothing else precedes it
	first := s.lsn

	w := tableWriter{s: s}
	for _, seg := range s.segs {
		if seg.state == segClosed {
			w.add(kindSegments, uint64(seg.n)|uint64(seg.life)<<32, seg.gen, seg.last|uint64(seg.tail)<<lastBits)
		}
	}
	// In order: the same requests give the same bytes, always.
	volumes := slices.Sorted(maps.Keys(s.vols))
	for _, id := range volumes {
		v := s.vols[id]
		r := v.record()
		w.add(kindVolumes, uint64(id), uint64(r.layer)|uint64(r.flags)<<32, r.version)
		v.logged = v.floor
	}
	for _, id := range volumes {
		v := s.vols[id]
		for _, m := range v.marks {
			w.add(kindLayerTable, uint64(id), uint64(m.id)|uint64(m.into)<<32, uint64(v.lastLayer))
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(s.drops), func(a, b dropKey) int {
		return cmp.Or(cmp.Compare(a.volume, b.volume), cmp.Compare(a.chunk, b.chunk))
	}) {
		lsn := s.drops[k]
		w.add(kindDrops, uint64(k.volume), uint64(k.chunk), lsn)
	}
	for _, g := range s.gaps {
		w.add(kindGaps, g.gen, g.from, g.to)
	}
	w.flush()
	for i := range s.roots[:min(len(s.roots), maxRoots)] {
		w.root(s.roots[i].record())
	}
	info.chunk, info.block = s.lsn-first+1, w.sum
	info.encode(g.buf[at:])
	return w.err
}

// tableWriter appends table entries in records of one kind.
type tableWriter struct {
	s    *Store
	kind kind
	buf  []byte // entries not appended yet, ≤ one batch
	sum  uint32
	err  error
}

func (w *tableWriter) add(k kind, a, b, c uint64) {
	if k != w.kind || len(w.buf)+tableEntry > batchRoom-recordFixed {
		w.flush()
	}
	w.kind = k
	w.buf = le.AppendUint64(w.buf, a)
	w.buf = le.AppendUint64(w.buf, b)
	w.buf = le.AppendUint64(w.buf, c)
}

func (w *tableWriter) flush() {
	if len(w.buf) == 0 || w.err != nil {
		return
	}
	r := record{kind: w.kind, count: uint32(len(w.buf) / tableEntry)}
	st, err := w.s.append(&r, len(w.buf))
	if err != nil {
		w.err = err
		return
	}
	copy(st.payload, w.buf)
	w.sum = tableSum(w.sum, w.kind, w.buf)
	w.buf = w.buf[:0]
}

// root appends the root of a checkpoint.
func (w *tableWriter) root(r record) {
	if w.err == nil {
		_, w.err = w.s.append(&r, 0)
		w.sum = rootSum(w.sum, &r)
	}
}

// rootSum continues a head's checksum by a root.
func rootSum(sum uint32, r *record) uint32 {
	var b [recordFixed]byte
	r.encode(b[:])
	return tableSum(sum, kindRoot, b[:])
}

// maxRoots is how many checkpoints a head names. One whose root is not durable
// yet may be among them: the head is behind it in the log.
const maxRoots = 3

// lastBits is the width of a last LSN in the table of segments.
const lastBits = 48

// tableSum continues a head's checksum by one table record.
func tableSum(sum uint32, k kind, entries []byte) uint32 {
	return (sum*31+uint32(k))*0x9e3779b1 ^ wire.Checksum(entries)
}

// tableEntries calls f for each entry of a table record.
func tableEntries(payload []byte, f func(a, b, c uint64)) {
	for ; len(payload) >= tableEntry; payload = payload[tableEntry:] {
		f(le.Uint64(payload), le.Uint64(payload[8:]), le.Uint64(payload[16:]))
	}
}

// dropKey names a forgotten chunk, or with chunk 0 a whole volume.
type dropKey struct {
	volume ids.VolumeID
	chunk  ids.ChunkID
}

// dropped reports whether a record of the chunk with this LSN is of the past.
func (s *Store) dropped(v ids.VolumeID, c ids.ChunkID, lsn uint64) bool {
	if len(s.drops) == 0 {
		return false
	}
	return s.drops[dropKey{v, 0}] > lsn || s.drops[dropKey{v, c}] > lsn
}

// pruneGaps forgets the gaps of segments that are no more.
func (s *Store) pruneGaps() {
	s.gaps = slices.DeleteFunc(s.gaps, func(p gap) bool {
		return !slices.ContainsFunc(s.segs, func(g *segment) bool { return g.state == segClosed && g.gen == p.gen })
	})
}

// pruneDrops forgets drops that no segment's records and no kept checkpoint are
// older than.
func (s *Store) pruneDrops() {
	if len(s.leaving) > 0 {
		return // their pages would meet those of a volume that comes back
	}
	oldest := s.lsn
	for _, r := range s.roots {
		oldest = min(oldest, r.from+1)
	}
	for _, g := range s.segs {
		if g.state != segFree {
			oldest = min(oldest, g.gen)
		}
	}
	for k, lsn := range s.drops {
		if lsn < oldest {
			delete(s.drops, k)
			delete(s.back, k)
		}
	}
}
