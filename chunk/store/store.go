// Package store keeps the chunks of one disk in a log of segments: nothing is
// overwritten in place, every block carries the checksum its gateway made, and
// what the index knows can be rebuilt from the log.
//
// Duty: the semantics of proto/wire over a disk.Disk: fencing by epoch, the
// version rule, flush, recovery, compaction. Floor: F2. It has no goroutine, no
// socket and no clock of its own; it does not know other replicas, and it never
// retries a disk that failed.
package store

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Format is the identity a disk gets when a store is made on it.
type Format struct {
	ID           ids.StoreID
	Incarnation  ids.Incarnation
	Cluster      string // name of the cluster it belongs to, ≤ 128 bytes
	SegmentBytes int64  // 0: 64 MiB, or less on a small disk
}

// Config opens a store. The disk stays the caller's: it closes it after Close.
type Config struct {
	Disk       disk.Disk
	BootID     string // of the running operating system; another one than last time means lost power
	Cluster    string // refuse a store of another cluster; "": any
	IndexBytes int64  // index pages in memory, when there are Pages; 0: 64 MiB
	Pages      Pages  // nil: the whole index stays in memory, and there are no checkpoints

	CheckpointBytes int64 // a checkpoint after so many bytes of log; 0: 512 MiB
}

// Usage is how full a store is and how it fares.
type Usage struct {
	CapacityBytes uint64 // what guests' data may fill
	UsedBytes     uint64 // of the disk, in segments that are in use
	LiveBytes     uint64 // blocks of guests' data
	State         string // "ok", "no room: why" or "failed: why"
	Note          string // what the last opening found damaged; "": nothing

	Segments, FreeSegments int
	DebtBytes              uint64 // dead in closed segments: what compaction could give back
	LogBytes               uint64 // written to the log since the opening: data, copies and records
	CopiedBytes            uint64 // of it, moved by compaction and straightening: LogBytes / (LogBytes - CopiedBytes) is the write amplification
	ChecksumErrors         uint64 // blocks that were read and did not match, since the opening
	IndexBytes             uint64 // of index pages in memory
	IndexMisses            uint64 // pages fetched, since the opening
	UnsavedPages           uint64 // changed since they were saved
	ReplayedBytes          uint64 // of log that the opening read behind its checkpoint
	CheckpointLag          uint64 // bytes of log behind the last checkpoint begun
}

// WriteAmplification is what was written to the log for each byte of it that was
// no copy; 1 when nothing was written.
func (u *Usage) WriteAmplification() float64 {
	if u.LogBytes <= u.CopiedBytes {
		return 1
	}
	return float64(u.LogBytes) / float64(u.LogBytes-u.CopiedBytes)
}

// Reserves of free segments: compaction leaves one, because the next opening,
// after whatever crash, begins a segment; tombstones, drops and seals leave two,
// guests' writes leave four.
const (
	reserveCopies = 1
	reserveSystem = 2
	reserveWrites = 4
	minSegments   = 12
	minSegBlocks  = 64
	maxSegBlocks  = 64 << 20 / blockBytes
)

// Store is one open store. Its methods may be called from any goroutine.
type Store struct {
	cfg         Config
	disk        disk.Disk
	now         disk.Immediate // the disk, if it can answer from memory
	super       super
	incarnation ids.Incarnation
	life        uint32
	recovered   uint64 // highest LSN the opening found
	note        string
	capacity    uint64 // blocks

	mu      sync.Mutex  // guards everything below; never held over a disk call or a sink
	cond    *sync.Cond  // a disk call has ended
	births  uint64      // lives of chunks named since it was opened
	failed  error       // the store has stopped for good
	halted  atomic.Bool // failed is set
	closed  bool        // no request is taken any more
	opening bool        // Open waits for disk calls to end

	vols  map[ids.VolumeID]*vol
	idx   index
	live  uint64 // data blocks
	segs  []*segment
	free  []*segment // with room on the disk behind them: see room.go
	bare  []*segment // free, with none yet
	open  *segment   // takes appends
	drops map[dropKey]uint64
	back  map[dropKey]bool // dropped chunks that their volume's writer brings back
	gaps  []gap            // damage that is known already
	roots []root           // of the kept checkpoints, newest first; of those behind the last two none is durable
	ckpt  checkpoint

	// The log. durable ≤ written ≤ lsn.
	lsn             uint64 // last one given to a batch
	written         uint64
	durable         uint64
	marked          uint64 // the durable LSN the log itself knows
	markAt          time.Duration
	syncedFrom      int64  // logged, when the last sync began
	groups, flushes int    // written and synced since the open segment was opened
	logged          int64  // bytes of log written since the opening
	openFrom        int64  // logged, when the open segment was opened
	copied          uint64 // blocks compaction appended since then
	replayed        int64  // bytes of log the opening read behind its checkpoint
	badSums         atomic.Uint64
	group           *group // takes records; last of queue, or nil
	batch           batchHead
	inHead          bool
	queue           []*group // ≤ maxStaged bytes, and one request more
	writing         *group
	buffers         [][]byte
	floors          []*vol // their floor is not in the log yet

	syncing bool
	syncs   []syncWait

	waiting      []*held // writes that wait for space or for the disk
	waitingBytes int64   // ≤ maxWaiting

	dead       []*segment // nothing points to them, maybe
	pinned     []*segment // given up, to be discarded
	discards   int        // in flight
	starved    bool       // the disk had no room to give
	probe      bool       // it is asked again
	allocating bool       // a restock is in flight
	leaving    []*chunk   // dropped, still in the index's figures
	merges     []*merge   // ≤ maxMerges; the first one is under way
	reading    int        // windows of merges being read
	compact    compaction
	scrub      scrubber
	straight   straightener
}

const defaultIndexBytes = 64 << 20

// Make formats d as an empty store. A disk that holds one is refused
// (status.Exists): nothing is lost by formatting twice.
func Make(d disk.Disk, f Format) error {
	p, err := f.super(d)
	if err != nil {
		return err
	}
	if old, _, err := readSuper(d); err == nil {
		return status.Errorf(status.Exists, "the disk already holds store %s: erase it first if its data may go", old.ID)
	} else if k := status.Of(err); k != status.NotFound {
		return err
	}
	s := newStore(Config{Disk: d, BootID: "format"}, *p)
	s.incarnation, s.life = f.Incarnation, 1
	if err := s.backFree(1); err != nil {
		return err
	}
	if err := s.firstHead(); err != nil {
		return err
	}
	if err := disk.WriteAt(d, append(p.encode(), p.encode()...), 0); err != nil {
		return status.Errorf(status.IO, "write the superblock: %w", err)
	}
	if err := disk.SyncAll(d); err != nil {
		return status.Errorf(status.IO, "sync the superblock: %w", err)
	}
	return nil
}

// super checks f and lays the disk out.
func (f *Format) super(d disk.Disk) (*super, error) {
	if f.ID.IsZero() || f.Incarnation == 0 || len(f.Cluster) > maxCluster {
		return nil, status.Errorf(status.Invalid, "a store needs an id, an incarnation and a cluster name of at most %d bytes", maxCluster)
	}
	blocks := d.Size()/blockBytes - logStart
	if blocks > 1<<32-1-logStart {
		return nil, status.Errorf(status.TooBig, "a store of %d bytes is over the limit of 16 TiB", d.Size())
	}
	seg := f.SegmentBytes
	if seg == 0 {
		for seg = 64 << 20; seg > 1<<20 && blocks*blockBytes/seg < 256; {
			seg /= 2
		}
	}
	if seg%blockBytes != 0 || seg < minSegBlocks*blockBytes || seg > maxSegBlocks*blockBytes || blocks*blockBytes/seg < minSegments {
		return nil, status.Errorf(status.Invalid, "a disk of %d bytes does not make a store of segments of %d bytes: it needs %d of them, of %d KiB to 64 MiB",
			d.Size(), seg, minSegments, minSegBlocks*blockBytes>>10)
	}
	return &super{ID: f.ID, Incarnation: f.Incarnation, Cluster: f.Cluster, segBlocks: uint32(seg / blockBytes), segments: uint32(blocks * blockBytes / seg)}, nil
}

// readSuper finds a good superblock, and the copy (0 or 1) that is to be written
// anew; -1: none. Where both are good and differ, a Grow was cut short, and the
// larger one counts.
func readSuper(d disk.Disk) (p *super, bad int64, err error) {
	if d.Size() < 2*blockBytes {
		return nil, -1, status.Errorf(status.NotFound, "the disk of %d bytes is too small to hold a store", d.Size())
	}
	b := make([]byte, 2*blockBytes)
	if err := disk.ReadAt(d, b, 0); err != nil {
		return nil, -1, status.Errorf(status.IO, "read the superblock: %w", err)
	}
	p, err = decodeSuper(b[:blockBytes])
	q, err2 := decodeSuper(b[blockBytes:])
	switch {
	case err == nil && err2 == nil && *p == *q:
		return p, -1, nil
	case err == nil && (err2 != nil || p.segments > q.segments):
		return p, 1, nil
	case err2 == nil:
		return q, 0, nil
	case status.Of(err2) != status.NotFound:
		return nil, -1, err2
	}
	return nil, -1, err
}

func newStore(cfg Config, p super) *Store {
	s := &Store{cfg: cfg, disk: cfg.Disk, super: p, vols: map[ids.VolumeID]*vol{}, drops: map[dropKey]uint64{}, back: map[dropKey]bool{}}
	s.cond = sync.NewCond(&s.mu)
	s.now, _ = cfg.Disk.(disk.Immediate)
	s.idx = index{limit: cfg.IndexBytes, pages: cfg.Pages, mark: p.mark(), blocks: logStart + p.segments*p.segBlocks}
	s.batch.used = batchRoom
	for n := range p.segments {
		g := &segment{n: n}
		s.segs = append(s.segs, g)
		s.bare = append(s.bare, g)
	}
	s.compact.s = s
	perSegment := uint64(p.segBlocks) - uint64(p.segBlocks)/32 - 4
	s.capacity = uint64(p.segments-reserveWrites-2) * perSegment * 3 / 4
	return s
}

// Open opens the store on cfg.Disk, after whatever end it came to.
func Open(cfg Config) (*Store, error) {
	if cfg.BootID == "" || len(cfg.BootID) > maxBootBytes {
		return nil, status.Errorf(status.Invalid, "a store cannot tell a kill from a power loss without the boot id of the system (1 to %d bytes)", maxBootBytes)
	}
	if cfg.IndexBytes == 0 {
		cfg.IndexBytes = defaultIndexBytes
	}
	if cfg.CheckpointBytes == 0 {
		cfg.CheckpointBytes = defaultCheckpointBytes
	}
	p, bad, err := readSuper(cfg.Disk)
	if err != nil {
		return nil, err
	}
	if cfg.Cluster != "" && cfg.Cluster != p.Cluster {
		return nil, status.Errorf(status.Invalid, "store %s belongs to cluster %q, not to %q: give this cluster a disk of its own", p.ID, p.Cluster, cfg.Cluster)
	}
	if err := p.fits(cfg.Disk); err != nil {
		return nil, err
	}
	if bad >= 0 {
		if err := p.write(cfg.Disk, bad); err != nil {
			return nil, err
		}
	}
	s := newStore(cfg, *p)
	if err := s.recover(); err != nil {
		return nil, err
	}
	return s, nil
}

// ID returns the store's identity.
func (s *Store) ID() ids.StoreID { return s.super.ID }

// Incarnation returns the store's life count. It rises by itself when recovery
// finds damage in what was durable: the store is then not the one that was in
// sync, and has to be compared with its peers.
func (s *Store) Incarnation() ids.Incarnation { return s.incarnation }

// Usage tells how full the store is.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := Usage{CapacityBytes: s.capacity * blockBytes, LiveBytes: s.live * blockBytes, State: "ok", Note: s.note}
	u.Segments, u.FreeSegments = len(s.segs), len(s.free)+len(s.bare)
	for _, g := range s.segs {
		if g.state != segFree {
			u.UsedBytes += uint64(g.tail) * blockBytes
		}
		if g.state == segClosed {
			u.DebtBytes += uint64(g.tail-min(g.tail, g.weight())) * blockBytes
		}
	}
	u.LogBytes, u.CopiedBytes, u.ChecksumErrors = uint64(s.logged), s.copied*blockBytes, s.badSums.Load()
	u.IndexBytes, u.IndexMisses, u.UnsavedPages = uint64(len(s.idx.ring))*pageBytes, s.idx.misses, uint64(len(s.idx.queue))
	u.ReplayedBytes, u.CheckpointLag = uint64(s.replayed), uint64(max(s.logged-s.ckpt.loggedBefore, 0))
	if s.starved {
		u.State = "no room: the file system under the store is full"
	}
	if s.failed != nil {
		u.State = "failed: " + s.failed.Error()
	}
	return u
}

// Volumes returns the live bytes of each volume the store knows.
func (s *Store) Volumes() map[ids.VolumeID]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[ids.VolumeID]uint64, len(s.vols))
	for id, v := range s.vols {
		out[id] = v.live * blockBytes
	}
	return out
}

// Holds reports whether the store knows a volume.
func (s *Store) Holds(id ids.VolumeID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vols[id] != nil
}

// markEvery is how long an idle log may know less than was made durable.
const markEvery = time.Second

// Step does a short piece of background work: it logs what became durable,
// gives dead segments back and compacts. now is any clock that only rises.
func (s *Store) Step(now time.Duration) {
	var out outbox
	s.mu.Lock()
	if s.failed == nil && !s.closed {
		if err := s.step(now, &out); err != nil {
			s.fail(err, &out)
		}
		s.proceed(&out)
	}
	s.unlock(&out)
}

func (s *Store) step(now time.Duration, out *outbox) error {
	if err := s.forget(2000); err != nil {
		return err
	}
	s.probe = true
	pinned := s.pinned
	s.pinned = nil
	s.discard(pinned, out)
	if err := s.releaseDead(); err != nil {
		return err
	}
	if now-s.markAt >= markEvery && (s.durable > s.marked || len(s.floors) > 0) && s.roomFor(0, reserveSystem) {
		s.markAt = now
		if err := s.makeRoom(batchRoom, 0); err != nil { // a new batch says it
			return err
		}
	}
	if err := s.checkpointStep(); err != nil {
		return err
	}
	if err := s.scrub.step(s, now, out); err != nil {
		return err
	}
	if err := s.straight.tick(s, out); err != nil {
		return err
	}
	return s.compact.step(out, true)
}

// Close finishes what was begun, makes it durable and says in the log that
// nothing was lost. The disk stays open.
func (s *Store) Close() error {
	var out outbox
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	for _, w := range s.waiting {
		out.fail(w.c, w.q.Kind, w.q.ID, errShutdown)
	}
	s.waiting, s.waitingBytes = nil, 0
	s.abortMerges(func(*merge) bool { return true }, status.Shutdown, errShutdown.Error(), &out)
	s.unlock(&out)

	s.mu.Lock()
	for s.failed == nil && (s.compact.busy() || s.scrub.busy) || s.discards > 0 || s.idx.busy || s.reading > 0 {
		s.cond.Wait()
	}
	done := false
	if s.failed == nil {
		if _, err := s.append(&record{kind: kindClean}, 0); err != nil {
			s.fail(err, &out)
		}
		s.syncs = append(s.syncs, syncWait{lsn: s.lsn, then: func(*outbox) { done = true }})
		s.pump(&out)
	}
	s.unlock(&out)
	s.mu.Lock()
	defer s.mu.Unlock()
	for (s.failed == nil && !done) || s.writing != nil || s.syncing {
		s.cond.Wait()
	}
	return s.failed
}

var errShutdown = status.Errorf(status.Shutdown, "the store is closing")

var _ interface {
	Submit([]*wire.Request, wire.Sink)
} = (*Store)(nil)
