package disk

import (
	"math/rand/v2"
	"sync"
	"syscall"
)

// SectorBytes is what a memory disk writes atomically: a crash tears writes
// between sectors.
const SectorBytes = 512

// Mem is a memory disk that completes every operation inside Submit and can
// crash: Crash gives the disk as found after a power loss.
type Mem struct {
	mu      sync.Mutex // guards all fields
	data    []byte
	durable []byte
	dirty   sectorSet // written since the last sync
	ever    sectorSet // written since the disk was all zeros
	ops     int       // writes and syncs so far
	failAt  int       // the op with this number fails (1 = the next); 0: none
	cutAt   int       // from this op on nothing takes effect and nothing is answered OK
}

var (
	_ Disk      = (*Mem)(nil)
	_ Immediate = (*Mem)(nil)
)

// NewMem returns a zeroed disk of size bytes (a multiple of SectorBytes).
func NewMem(size int64) *Mem {
	return &Mem{data: make([]byte, size), durable: make([]byte, size), dirty: newSectorSet(size), ever: newSectorSet(size)}
}

// sectorSet is a set of sectors that is cheap to walk and to empty: a crash
// costs what was written, not what the disk holds.
type sectorSet struct {
	has  []bool
	list []int64 // those that has says, in the order they came
}

func newSectorSet(size int64) sectorSet { return sectorSet{has: make([]bool, size/SectorBytes)} }

func (s *sectorSet) add(i int64) {
	if !s.has[i] {
		s.has[i] = true
		s.list = append(s.list, i)
	}
}

func (s *sectorSet) empty() {
	for _, i := range s.list {
		s.has[i] = false
	}
	s.list = s.list[:0]
}

// Size returns the size in bytes.
func (m *Mem) Size() int64 { return int64(len(m.data)) }

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
	m.mu.Lock()
	defer m.mu.Unlock()
	c := NewMem(int64(len(m.data)))
	copy(c.data, m.durable)
	for _, s := range m.ever.list {
		c.ever.add(s)
	}
	for _, s := range m.dirty.list {
		if keepPercent < 100 && mixSector(seed, s)%100 >= uint64(keepPercent) {
			continue
		}
		copy(c.data[s*SectorBytes:(s+1)*SectorBytes], m.data[s*SectorBytes:])
	}
	copy(c.durable, c.data)
	return c
}

// PowerLoss is Crash done to m itself, for who does not need the disk as it was
// before.
func (m *Mem) PowerLoss(seed uint64, keepPercent int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.dirty.list {
		now, kept := m.data[s*SectorBytes:(s+1)*SectorBytes], m.durable[s*SectorBytes:(s+1)*SectorBytes]
		if keepPercent < 100 && mixSector(seed, s)%100 >= uint64(keepPercent) {
			copy(now, kept)
		} else {
			copy(kept, now)
		}
	}
	m.dirty.empty()
}

// Clear makes m the zeroed disk that NewMem gives, at the cost of what was
// written to it.
func (m *Mem) Clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.ever.list {
		clear(m.data[s*SectorBytes : (s+1)*SectorBytes])
		clear(m.durable[s*SectorBytes : (s+1)*SectorBytes])
	}
	m.dirty.empty()
	m.ever.empty()
	m.ops, m.failAt, m.cutAt = 0, 0, 0
}

// Written calls f for each sector that was ever written, with its bytes as they
// are, lowest first; all others are zeros.
func (m *Mem) Written(f func(sector int64, b []byte)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s, has := range m.ever.has {
		if has {
			f(int64(s), m.data[s*SectorBytes:(s+1)*SectorBytes])
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
	m.ever.add(off / SectorBytes)
	m.data[off] ^= 1 << (bit % 8)
	m.durable[off] ^= 1 << (bit % 8)
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
	if err := op.inside(int64(len(m.data))); err != nil {
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
			off += int64(copy(b, m.data[off:]))
		}
	case Write:
		for _, b := range op.Bufs {
			off += int64(copy(m.data[off:], b))
		}
		m.soil(op.Off, off)
	case Discard:
		clear(m.data[off : off+op.Len])
		m.soil(off, off+op.Len)
	case Sync:
		for _, s := range m.dirty.list {
			copy(m.durable[s*SectorBytes:(s+1)*SectorBytes], m.data[s*SectorBytes:])
		}
		m.dirty.empty()
	}
	return nil
}

func (m *Mem) soil(from, to int64) {
	for s := from / SectorBytes; s*SectorBytes < to; s++ {
		m.dirty.add(s)
		m.ever.add(s)
	}
}
