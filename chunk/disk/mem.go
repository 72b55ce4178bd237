package disk

import (
	"math/rand/v2"
	"sync"
	"syscall"

	"github.com/cairnstore/cairn/proto/status"
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
	dirty   map[int64]struct{} // sectors written since the last sync
	ops     int                // writes and syncs so far
	failAt  int                // the op with this number fails (1 = the next); 0: none
	cutAt   int                // from this op on nothing takes effect and nothing is answered OK
}

var (
	_ Disk      = (*Mem)(nil)
	_ Immediate = (*Mem)(nil)
)

// NewMem returns a zeroed disk of size bytes (a multiple of SectorBytes).
func NewMem(size int64) *Mem {
	return &Mem{data: make([]byte, size), durable: make([]byte, size), dirty: map[int64]struct{}{}}
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
	for s := range m.dirty {
		if keepPercent < 100 && mixSector(seed, s)%100 >= uint64(keepPercent) {
			continue
		}
		copy(c.data[s*SectorBytes:(s+1)*SectorBytes], m.data[s*SectorBytes:])
	}
	copy(c.durable, c.data)
	return c
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
	if op.Kind != Sync && (op.Off < 0 || op.Off+total(op.Bufs)+op.Len > int64(len(m.data))) {
		return status.Errorf(status.Invalid, "disk access at %d is beyond the end at %d", op.Off, len(m.data))
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
		for s := range m.dirty {
			copy(m.durable[s*SectorBytes:(s+1)*SectorBytes], m.data[s*SectorBytes:])
		}
		clear(m.dirty)
	}
	return nil
}

func (m *Mem) soil(from, to int64) {
	for s := from / SectorBytes; s*SectorBytes < to; s++ {
		m.dirty[s] = struct{}{}
	}
}
