package disk

import (
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
)

// SectorBytes is what a memory disk writes atomically: a crash tears writes
// between sectors.
const SectorBytes = 512

// Mem is a memory disk that completes every operation inside Submit and can
// crash: Crash gives the disk as found after a power loss. Its pages are never
// changed once they are there, so that a crash copies what was written since
// the last sync and shares the rest.
type Mem struct {
	mu      sync.Mutex // guards all fields
	size    int64
	data    []*memPage // nil: zeros
	durable []*memPage
	unsync  []uint8 // of each page, the sectors written since the last sync
	dirty   []int   // pages with such sectors, in the order they came
	ops     int     // writes and syncs so far
	failAt  int     // the op with this number fails (1 = the next); 0: none
	cutAt   int     // from this op on nothing takes effect and nothing is answered OK
}

const (
	memPageBytes = 4096
	pageSectors  = memPageBytes / SectorBytes
)

type memPage [memPageBytes]byte

// zeroPage is read where there is no page.
var zeroPage memPage

func (p *memPage) bytes() *memPage {
	if p == nil {
		return &zeroPage
	}
	return p
}

var (
	_ Disk      = (*Mem)(nil)
	_ Immediate = (*Mem)(nil)
)

// NewMem returns a zeroed disk of size bytes (a multiple of SectorBytes).
func NewMem(size int64) *Mem {
	n := (size + memPageBytes - 1) / memPageBytes
	return &Mem{size: size, data: make([]*memPage, n), durable: make([]*memPage, n), unsync: make([]uint8, n)}
}

// Size returns the size in bytes.
func (m *Mem) Size() int64 { return m.size }

// Close does nothing: the bytes stay.
func (m *Mem) Close() error { return nil }

// Ops returns how many writes, discards and syncs were submitted.
func (m *Mem) Ops() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ops
}

// FailAt makes the write or sync with number n (counted by Ops) fail with EIO.
func (m *Mem) FailAt(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failAt = n
}

// CutAt makes every write or sync numbered n or above fail without effect, as
// if the power had gone just before it.
func (m *Mem) CutAt(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cutAt = n
}

// Crash returns the disk after a power loss now: each unsynced sector is kept
// with keepPercent probability, chosen by seed. 100 is a kill of the process.
func (m *Mem) Crash(seed uint64, keepPercent int) *Mem {
	return m.CrashKeeping(byChance(seed, keepPercent))
}

func byChance(seed uint64, keepPercent int) func(int64) bool {
	return func(s int64) bool { return keepPercent >= 100 || mixSector(seed, s)%100 < uint64(keepPercent) }
}

// CrashKeeping is Crash that keeps the unsynced sectors keep says.
func (m *Mem) CrashKeeping(keep func(sector int64) bool) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &Mem{size: m.size, data: slices.Clone(m.durable), unsync: make([]uint8, len(m.unsync))}
	for _, n := range m.dirty {
		c.data[n] = m.kept(n, keep)
	}
	c.durable = slices.Clone(c.data)
	return c
}

// PowerLoss is Crash done to m itself, for who does not need the disk as it was
// before.
func (m *Mem) PowerLoss(seed uint64, keepPercent int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.dirty {
		m.data[n] = m.kept(n, byChance(seed, keepPercent))
		m.durable[n] = m.data[n]
	}
	m.synced()
}

// kept is what a power loss leaves of a page.
func (m *Mem) kept(n int, keep func(int64) bool) *memPage {
	var mask uint8
	for i := range pageSectors {
		if m.unsync[n]&(1<<i) != 0 && keep(int64(n*pageSectors+i)) {
			mask |= 1 << i
		}
	}
	return m.merge(n, mask)
}

// merge is the durable page with some sectors as they are now.
func (m *Mem) merge(n int, mask uint8) *memPage {
	switch mask {
	case 0:
		return m.durable[n]
	case 1<<pageSectors - 1:
		return m.data[n]
	}
	p, now := *m.durable[n].bytes(), m.data[n].bytes()
	for i := range pageSectors {
		if mask&(1<<i) != 0 {
			copy(p[i*SectorBytes:(i+1)*SectorBytes], now[i*SectorBytes:])
		}
	}
	return &p
}

func (m *Mem) synced() {
	for _, n := range m.dirty {
		m.unsync[n] = 0
	}
	m.dirty = m.dirty[:0]
}

// Clear makes m the zeroed disk that NewMem gives.
func (m *Mem) Clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data)
	clear(m.durable)
	m.synced()
	m.ops, m.failAt, m.cutAt = 0, 0, 0
}

// Written calls f for the sectors that may hold something, with their bytes as
// they are, lowest first; all others are zeros.
func (m *Mem) Written(f func(sector int64, b []byte)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n, p := range m.data {
		for i := 0; p != nil && i < pageSectors; i++ {
			f(int64(n*pageSectors+i), p[i*SectorBytes:(i+1)*SectorBytes])
		}
	}
}

// mixSector hashes a sector so that the outcome depends on the seed and not on
// the order of a map.
func mixSector(seed uint64, s int64) uint64 {
	return rand.NewPCG(seed, uint64(s)).Uint64()
}

// Flip inverts one bit, durably: rot, or a misdirected write.
func (m *Mem) Flip(off int64, bit uint) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, pages := range [][]*memPage{m.data, m.durable} {
		p := *pages[off/memPageBytes].bytes()
		p[off%memPageBytes] ^= 1 << (bit % 8)
		pages[off/memPageBytes] = &p
	}
}

// ReadNow reads at once.
func (m *Mem) ReadNow(b []byte, off int64) bool {
	return m.run(&Op{Kind: Read, Off: off, Bufs: [][]byte{b}}) == nil
}

// Submit runs op at once.
func (m *Mem) Submit(op *Op) { op.Done(m.run(op)) }

func (m *Mem) run(op *Op) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := op.inside(m.size); err != nil {
		return err
	}
	if op.Kind == Allocate {
		return nil
	}
	if op.Kind != Read {
		m.ops++
		if m.ops == m.failAt || m.cutAt > 0 && m.ops >= m.cutAt {
			return syscall.EIO
		}
	}
	off := op.Off
	switch op.Kind {
	case Read:
		for _, b := range op.Bufs {
			for len(b) > 0 {
				n := copy(b, m.data[off/memPageBytes].bytes()[off%memPageBytes:])
				b, off = b[n:], off+int64(n)
			}
		}
	case Write:
		for _, b := range op.Bufs {
			for len(b) > 0 {
				n := min(int64(len(b)), memPageBytes-off%memPageBytes)
				m.put(off, b[:n])
				b, off = b[n:], off+n
			}
		}
	case Discard:
		for end := off + op.Len; off < end; {
			n := min(end-off, memPageBytes-off%memPageBytes)
			m.put(off, zeroPage[:n])
			off += n
		}
	case Sync:
		for _, n := range m.dirty {
			m.durable[n] = m.merge(n, m.unsync[n])
		}
		m.synced()
	}
	return nil
}

// put writes inside one page.
func (m *Mem) put(off int64, b []byte) {
	n, at := int(off/memPageBytes), int(off%memPageBytes)
	if &b[0] == &zeroPage[0] && len(b) == memPageBytes {
		m.data[n] = nil
	} else {
		p := new(memPage)
		if len(b) < memPageBytes {
			*p = *m.data[n].bytes()
		}
		copy(p[at:], b)
		m.data[n] = p
	}
	if m.unsync[n] == 0 {
		m.dirty = append(m.dirty, n)
	}
	for i := at / SectorBytes; i*SectorBytes < at+len(b); i++ {
		m.unsync[n] |= 1 << i
	}
}
