package bench

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/chunk/server/checkpoint"
	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// benchBoot is the boot id stores are opened with: the system does not fall.
const benchBoot = "bench"

// stepEvery is how often a host drives its stores.
const stepEvery = 100 * time.Millisecond

// openStore is a store that runs as it does in a host.
type openStore struct {
	*store.Store
	path  string
	disk  *disk.File
	pages *checkpoint.Pages
	stop  chan struct{}
	done  chan struct{}
}

// makeStore formats a store of its own, whose file keeps its room: a host makes
// no other unless it is told to.
func (b *storeBench) makeStore(name string, size int64) (*openStore, error) {
	d, err := disk.Create(b.path(name), size)
	if err != nil {
		return nil, err
	}
	if err = d.Reserve(); err == nil {
		err = store.Make(d, store.Format{ID: ids.NewStoreID(), Incarnation: 1})
	}
	if err = errors.Join(err, d.Close()); err != nil {
		return nil, err
	}
	return runStore(b.path(name), 0)
}

// runStore opens a store; indexBytes 0 is its default.
func runStore(path string, indexBytes int64) (*openStore, error) {
	d, err := disk.Open(path)
	if err != nil {
		return nil, err
	}
	if err := d.Reserve(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	p, err := checkpoint.Open(path + "-pages")
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	s, err := store.Open(store.Config{Disk: d, BootID: benchBoot, Pages: p, IndexBytes: indexBytes})
	if err != nil {
		return nil, errors.Join(err, d.Close(), p.Close())
	}
	o := &openStore{Store: s, path: path, disk: d, pages: p, stop: make(chan struct{}), done: make(chan struct{})}
	go o.drive()
	return o, nil
}

func (o *openStore) drive() {
	defer close(o.done)
	t := time.NewTicker(stepEvery)
	defer t.Stop()
	for start := time.Now(); ; {
		select {
		case <-o.stop:
			return
		case <-t.C:
			o.Step(time.Since(start))
		}
	}
}

// close leaves the file; remove does not.
func (o *openStore) close() error {
	close(o.stop)
	<-o.done
	return errors.Join(o.Close(), o.disk.Close(), o.pages.Close())
}

func (o *openStore) remove() error {
	return errors.Join(o.close(), os.Remove(o.path), os.RemoveAll(o.path+"-pages"))
}

// cool takes the store's file out of the page cache.
func (o *openStore) cool() error {
	f, err := os.Open(o.path)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fdatasync(int(f.Fd())), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
}

// volumeID is the only volume of the benchmark's stores.
const volumeID ids.VolumeID = 1

// chunkBlocks is the default size of a chunk.
const chunkBlocks = 16384

// load is requests to keep in flight.
type load struct {
	depth int
	flush bool // each write is followed by a flush, and is done with that
	count int  // stop after so many; 0: after each
	each  time.Duration
	next  func(q *wire.Request) // fills in a request of the load
}

// loadResult is how a load went.
type loadResult struct {
	ops     int
	took    time.Duration
	cpu     time.Duration
	longest time.Duration
}

func (r loadResult) perS() float64  { return float64(r.ops) / r.took.Seconds() }
func (r loadResult) cpuUs() float64 { return float64(r.cpu.Nanoseconds()) / 1000 / float64(r.ops) }

// slot is one request in flight at a time.
type slot struct {
	q     wire.Request
	since time.Time
	flush bool // the flush is under way
}

// runner is a load in progress. Replies that come while requests are being
// submitted are taken up by whoever submits.
type runner struct {
	load
	s     *store.Store
	slots []slot

	mu      sync.Mutex // guards the fields below
	ready   []uint64
	busy    bool
	flying  int
	ops     int
	stopped bool
	longest time.Duration
	err     error
	end     time.Time
	done    chan struct{}
}

// run plays a load to its end.
func (o *openStore) run(ctx context.Context, l load) (loadResult, error) {
	r := &runner{load: l, s: o.Store, slots: make([]slot, l.depth), flying: l.depth, done: make(chan struct{})}
	for i := range r.slots {
		r.ready = append(r.ready, uint64(i))
		r.slots[i].flush = true // as if one had just ended
	}
	r.ops = -l.depth
	cancel := context.AfterFunc(ctx, func() { r.mu.Lock(); r.stopped = true; r.mu.Unlock() })
	defer cancel()
	start, cpu := time.Now(), ownCPU()
	r.end = start.Add(l.each)
	r.mu.Lock()
	r.goOn()
	r.mu.Unlock()
	<-r.done
	return loadResult{ops: r.ops, took: time.Since(start), cpu: ownCPU() - cpu, longest: r.longest}, r.err
}

// Replies takes what the store answers.
func (r *runner) Replies(rs []*wire.Reply) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rep := range rs {
		if rep.Status != status.OK && r.err == nil {
			r.err, r.stopped = rep.Err(), true
		}
		r.ready = append(r.ready, rep.ID)
	}
	if !r.busy {
		r.goOn()
	}
}

// goOn refills until nothing is ready. Called with the lock, which it lets go
// of while it submits.
func (r *runner) goOn() {
	r.busy = true
	var qs []*wire.Request
	for len(r.ready) > 0 {
		now := time.Now()
		if r.count == 0 && now.After(r.end) {
			r.stopped = true
		}
		qs = qs[:0]
		for _, id := range r.ready {
			s := &r.slots[id]
			if r.flush && !s.flush {
				s.flush = true
				s.q = wire.Request{ID: id, Kind: wire.Flush, Volume: volumeID}
				qs = append(qs, &s.q)
				continue
			}
			if r.ops++; !s.since.IsZero() {
				r.longest = max(r.longest, now.Sub(s.since))
			}
			if r.stopped || r.count > 0 && r.ops+r.flying > r.count {
				r.flying--
				continue
			}
			s.flush, s.since = false, now
			s.q.ID = id
			r.next(&s.q)
			qs = append(qs, &s.q)
		}
		r.ready = r.ready[:0]
		if len(qs) > 0 {
			r.mu.Unlock()
			r.s.Submit(qs, r)
			r.mu.Lock()
		}
	}
	r.busy = false
	if r.flying == 0 {
		close(r.done)
	}
}

func ownCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// maker makes requests over a range of blocks of the volume. Its data does not
// compress to nothing and is the same for all: what differs are the versions.
type maker struct {
	blocks int // of the range
	rng    *rand.Rand
	data   []byte
	sums   [][]uint32 // one of each slot is in use at a time, and one more
	turn   int
	ctr    uint64
	at     int // of a sequential load
}

func newMaker(blocks int) *maker {
	m := &maker{blocks: blocks, rng: rand.New(rand.NewPCG(1, 2)), data: make([]byte, wire.MaxIO*ids.BlockSize)}
	for i := range m.data {
		m.data[i] = byte(m.rng.Uint32())
	}
	for range 256 {
		m.sums = append(m.sums, make([]uint32, wire.MaxIO))
	}
	return m
}

// write fills in a write of n blocks.
func (m *maker) write(q *wire.Request, block, n int) {
	m.ctr++
	m.turn = (m.turn + 1) % len(m.sums)
	sums := m.sums[m.turn][:n]
	*q = wire.Request{ID: q.ID, Kind: wire.Write, Volume: volumeID, Chunk: ids.ChunkID(1 + block/chunkBlocks), Block: ids.Block(block % chunkBlocks),
		Count: uint32(n), Version: ids.MakeVersion(1, m.ctr), Data: m.data[:n*ids.BlockSize], Sums: sums}
	for i := range sums {
		sums[i] = wire.BlockSum(q.Volume, q.Chunk, 0, q.Block+ids.Block(i), q.Version, q.Data[i*ids.BlockSize:(i+1)*ids.BlockSize])
	}
}

func (m *maker) read(q *wire.Request, block, n int) {
	into := q.Into
	if len(into) < n*ids.BlockSize {
		into = make([]byte, n*ids.BlockSize)
	}
	*q = wire.Request{ID: q.ID, Kind: wire.Read, Volume: volumeID, Chunk: ids.ChunkID(1 + block/chunkBlocks), Block: ids.Block(block % chunkBlocks), Count: uint32(n), Into: into}
}

func (m *maker) randomWrite(q *wire.Request) { m.write(q, m.rng.IntN(m.blocks), 1) }
func (m *maker) randomRead(q *wire.Request)  { m.read(q, m.rng.IntN(m.blocks), 1) }

// bigBlocks is 1 MiB.
const bigBlocks = 256

func (m *maker) step() int {
	at := m.at
	m.at = (m.at + bigBlocks) % (m.blocks / bigBlocks * bigBlocks)
	return at
}
func (m *maker) bigWrite(q *wire.Request) { m.write(q, m.step(), bigBlocks) }
func (m *maker) bigRead(q *wire.Request)  { m.read(q, m.step(), bigBlocks) }
