package placement

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// meterPage is how many chunks' counters are made at once, when one of them is
// first used.
const meterPage = 512

// Meter measures the heat of one volume's chunks: Count on the data path costs
// an atomic add and, for the first use of a page, an allocation; Hottest decays
// what was counted. Memory is bounded by the chunks in use: 24 bytes each.
type Meter struct {
	dir atomic.Pointer[[]atomic.Pointer[heatPage]]

	mu   sync.Mutex // guards the fields below, the growth of dir, and the heat in pages
	last time.Duration
}

type heatPage struct {
	read, write [meterPage]atomic.Uint64 // bytes since the last Hottest
	heat        [meterPage]struct{ read, write float32 }
}

// Count notes bytes read from or written to a chunk. Any goroutine may call it.
func (m *Meter) Count(chunk uint32, bytes uint64, write bool) {
	p := m.page(chunk / meterPage)
	if write {
		p.write[chunk%meterPage].Add(bytes)
	} else {
		p.read[chunk%meterPage].Add(bytes)
	}
}

func (m *Meter) page(n uint32) *heatPage {
	if d := m.dir.Load(); d != nil && int(n) < len(*d) {
		if p := (*d)[n].Load(); p != nil {
			return p
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.dir.Load()
	if d == nil || int(n) >= len(*d) {
		grown := make([]atomic.Pointer[heatPage], max(int(n)+1, 8))
		if d != nil {
			for i := range *d {
				grown[i].Store((*d)[i].Load())
			}
		}
		d = &grown
		m.dir.Store(d)
	}
	if p := (*d)[n].Load(); p != nil {
		return p
	}
	p := &heatPage{}
	(*d)[n].Store(p)
	return p
}

// IndexedHeat is a chunk's heat by its index.
type IndexedHeat struct {
	Chunk uint32
	Heat
}

// coldBytes is what counts as no heat at all.
const coldBytes = 4096

// Hottest decays all heat to now and returns at most n chunks that have any,
// the hottest first, and a bit for each chunk, lowest index first, that says
// whether it was used since the last call. Called by one goroutine.
func (m *Meter) Hottest(now time.Duration, n int) (hot []IndexedHeat, used []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := float32(Heat{Read: 1}.Decay(now - m.last).Read)
	m.last = now
	d := m.dir.Load()
	if d == nil {
		return nil, nil
	}
	for i := range *d {
		p := (*d)[i].Load()
		if p == nil {
			continue
		}
		for j := range meterPage {
			h, r, w, c := &p.heat[j], p.read[j].Swap(0), p.write[j].Swap(0), i*meterPage+j
			h.read = h.read*f + float32(r)
			h.write = h.write*f + float32(w)
			if h.read+h.write >= coldBytes {
				hot = append(hot, IndexedHeat{uint32(c), Heat{float64(h.read), float64(h.write)}})
			}
			if r+w > 0 {
				used = append(used, make([]byte, c/8+1-len(used))...)
				used[c/8] |= 1 << (c % 8)
			}
		}
	}
	slices.SortFunc(hot, func(a, b IndexedHeat) int {
		return cmp.Or(cmp.Compare(b.Read+b.Write, a.Read+a.Write), cmp.Compare(a.Chunk, b.Chunk))
	})
	return slices.Clone(hot[:min(n, len(hot))]), used
}
