// Package volume is the volume engine: the replication protocol of one
// attached volume as a pure step function.
//
// Duty: everything the single fenced writer decides — admission, versions,
// which replicas must have accepted before a write is acknowledged, flush and
// floor, exclusion, attach, join. Floor: F2. It opens no sockets, reads no
// clock, starts no goroutine and takes no lock: chunk/gateway drives it, and a
// simulator can.
//
// # Stages of the data path (the functions stand in this order, over the files)
//
//  1. Step          an event (event.go) comes in, with the time
//  2. admit         an operation is cut into pieces, one per chunk   (admit.go)
//  3. issue         a piece gets its version and goes to every replica (write.go)
//  4. accepted      a replica has answered                            (write.go)
//  5. complete      all required replicas have: the client may be told
//  6. read, flush   the other two ways through    (read.go, confirm.go, flush.go)
//  7. replicas      links up and down, seals, resends, stalls   (replica.go)
//  8. membership    exclusion before acknowledgement            (member.go)
//  9. attach        seal, reconcile, settle, serve              (attach.go)
//  10. join         a member that was out catches up            (join.go)
//  11. catch up     what a joiner and a new copy have in common (catchup.go)
//  12. copies       chunks move to other stores                 (fill.go, plan.go)
//  13. transfer     how blocks are copied in all of these       (transfer.go)
//  14. pace         background copies yield to the guest        (pace.go)
//  15. hand-over    another host's gateway goes on               (handover.go)
//  16. layers       what a snapshot is, the cut, and what goes  (layer.go, cut.go, reclaim.go)
package volume

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Config says what an engine is to attach and how patient it is.
type Config struct {
	Host     string            // this gateway's host: its stores are read first
	Volume   *pb.Volume        // as the attach commit answered it: size, epoch, revision, members
	Chunks   []*pb.Chunk       // its whole map
	Origins  []*pb.OriginState // what a clone reads through, nearest first
	ReadOnly bool              // nothing is attached: the origins are shown, without a lease
	Stall    time.Duration     // an in-sync replica that makes no progress for so long is excluded (default 1 s)
	SealWait time.Duration     // attach waits so long for members beyond a sufficient set (default 1.5 s)
	Flush    time.Duration     // the engine flushes by itself so often when dirty (default 1 s)
	Grace    time.Duration     // the chunks of a member that is out for longer go elsewhere (default 10 min)
	CopyRate int64             // bytes per second that joins and new copies may use at most (default 256 MiB)
	Budget   Budget            // shared by the engines of a host; nil: no further limit
}

// Budget is what all background copies of a host share. Take is called under the
// engine's lock and must not block; false: not now.
type Budget interface {
	Take(now time.Duration, bytes int) bool
}

const (
	flushBytes    = 64 << 20 // the engine flushes by itself after so many unflushed bytes
	maxPieceBlock = 256      // blocks of one data request: 1 MiB

	spaceRetry    = 200 * time.Millisecond // a write that found a store full is sent again so often
	spacePatience = 2 * time.Second        // and a store alone in being full is excluded after that
	metaRetry     = 100 * time.Millisecond // a refused or unanswered change is decided anew after that
	bounceEvery   = 500 * time.Millisecond // a replica that failed, but must stay, gets a new connection so often
)

// State is what an engine is doing.
type State uint8

// The states, in the order they are passed.
const (
	Attaching State = iota // sealing and reconciling; operations wait
	Serving
	Draining // detaching: no new operations
	Ended    // fenced or detached; every operation is refused
)

// String returns the state's name.
func (s State) String() string {
	return [...]string{"attaching", "serving", "draining", "ended"}[s]
}

// Engine is one attached volume. It is not safe for concurrent use.
type Engine struct {
	cfg      Config
	volume   ids.VolumeID
	epoch    ids.Epoch
	revision uint64
	size     uint64   // bytes
	limit    uint64   // bytes; > 0: operations end here, below the size
	cuts     uint32   // of the map, up to this one
	perChunk uint32   // blocks
	copies   int      // wanted of each chunk
	nobody   *replica // stands at the positions of a chunk whose replica has left
	replicas []*replica
	byStore  map[ids.StoreID]*replica
	chunks   map[ids.ChunkIndex]*chunk

	state State
	why   string // of Ended, or what an attach waits for
	// endedAs is what operations are answered with from the end on: Fenced when
	// another writer has the volume, else Shutdown.
	endedAs status.Kind
	now     time.Duration
	out     *Out

	counter  uint64      // last version counter given: all versions ≤ (epoch, counter)
	floor    ids.Version // all in-sync replicas are durable up to here: floor ≤ lowest in flight - 1
	inFlight jobList     // issued writes in version order: head is the lowest
	freeJobs []*job

	waiting   opQueue // operations that came while attaching
	leaseTill time.Duration
	leaseHeld []*Op   // reads whose data is there but whose lease is not, and the like (doneLeased)
	confirm   confirm // of those
	stuck     []*read // reads no replica can serve now; bounded by the operations in flight
	freeReads []*read

	layers       layers
	cut          *cut // nil: none is under way
	openJobs     int  // jobs that are not done
	reclaim      *reclaim
	reclaimAfter time.Duration
	reclaimWhy   string    // why the last merging was given up
	look         *MetaCall // news of the volume were asked for

	origins    []*origin // nearest first; of a clone
	originNews int       // times they were brought
	viewing    []*read   // that go on in origins; bounded by the operations in flight
	stuckViews []stuckView
	told       []*testimony // of sources, that metadata is yet to confirm

	flush     flushState
	member    memberState
	doubts    uint64 // times a replica was suspected, or an attach went on without one
	alloc     allocState
	attach    *attach
	full      fullState
	moves     moveState
	hand      *handOver // nil: it stays here
	pace      pacer
	tellings  []*telling
	lookFor   *MetaCall // asked for tellings, in this step
	lag       lagState
	lastTick  time.Duration
	damageAt  time.Duration // when the replicas are asked again what is bad
	compare   *comparing    // nil: no chunk is compared now
	compareAt time.Duration // when the next one is
	compared  int           // chunks begun with
	// until then nobody made progress, or this process did not run
	stillUntil time.Duration

	sizeRevision uint64 // of the news the size is from
	throttle     throttle

	stats Stats
	slow  slowLog
	cause cause // of the operation that is being answered
}

// Stats counts what an engine has done since it was made.
type Stats struct {
	Reads, Writes, Flushes uint64
	MaxWriteStall          time.Duration
	MaxHold                time.Duration // of a snapshot's cut
	Excluded, Joined       uint64
	Repaired               uint64 // blocks rewritten from a good copy
	Stale                  uint64 // blocks that a copy had lost without a trace, found by comparing, given to it again
	ReadBlocks             uint64 // of clients' reads, that replicas answered
	LocalBlocks            uint64 // of those, by the replica of this host: ≤ ReadBlocks
	Confirmed              uint64 // reads answered without a lease, because the members said that no other epoch is sealed
	Moved                  uint64 // copies of chunks that took another's place, or came on top
	CopiedBytes            uint64 // data that joins and new copies have sent
}

// chunk is one allocated, or just being allocated, chunk.
type chunk struct {
	index    ids.ChunkIndex
	id       ids.ChunkID // 0 while being allocated
	replicas []*replica  // position = bit in job.need and job.have; e.nobody where one has left
	fills    []*fill     // by position: the copy there is being made and does not count; nil: it counts
	giving   *replica    // metadata was asked to give its copy up, and may have; nil: none
	jobs     []*job      // in flight or merging; bounded by the operations in flight
}

// members and under are empty for a place that has no chunk yet.
func (c *chunk) members() []*replica {
	if c == nil {
		return nil
	}
	return c.replicas
}

func (c *chunk) under() []*job {
	if c == nil {
		return nil
	}
	return c.jobs
}

// sortedChunks lists the chunks by index: what an engine does never depends on
// the order of a map.
func (e *Engine) sortedChunks() []*chunk {
	out := make([]*chunk, 0, len(e.chunks))
	for _, i := range slices.Sorted(maps.Keys(e.chunks)) {
		out = append(out, e.chunks[i])
	}
	return out
}

// New returns an engine that has begun to attach: its links are to be opened.
func New(now time.Duration, cfg Config, out *Out) (*Engine, error) {
	if cfg.Stall == 0 {
		cfg.Stall = time.Second
	}
	if cfg.SealWait == 0 {
		cfg.SealWait = 1500 * time.Millisecond
	}
	if cfg.Flush == 0 {
		cfg.Flush = time.Second
	}
	v := cfg.Volume
	if v.ChunkBytes == 0 || v.ChunkBytes%ids.BlockSize != 0 || v.SizeBytes%ids.BlockSize != 0 {
		return nil, status.Errorf(status.Invalid, "volume %q has a size of %d and chunks of %d bytes: both must be whole blocks", v.Name, v.SizeBytes, v.ChunkBytes)
	}
	if cfg.Grace == 0 {
		cfg.Grace = 10 * time.Minute
	}
	if cfg.CopyRate == 0 {
		cfg.CopyRate = 256 << 20
	}
	e := &Engine{cfg: cfg, volume: ids.VolumeID(v.Id), epoch: ids.Epoch(v.Epoch), revision: v.Revision,
		size: v.SizeBytes, perChunk: uint32(v.ChunkBytes / ids.BlockSize),
		byStore: map[ids.StoreID]*replica{}, chunks: map[ids.ChunkIndex]*chunk{}, now: now, lastTick: now, out: out}
	e.cfg.Volume, e.cfg.Chunks = nil, nil
	e.copies, e.nobody = int(v.Replicas), &replica{index: -1}
	e.moves.look = true
	e.pace.init(now, cfg.CopyRate)
	e.inFlight.init()
	e.layers.begin(v)
	e.addMembers(v.Members)
	for _, c := range cfg.Chunks {
		if err := e.adoptChunk(c); err != nil {
			return nil, err
		}
	}
	e.cuts, e.sizeRevision = v.Cuts, v.Revision
	e.setQos(v.Qos)
	if err := e.takeOrigins(cfg.Origins, nil); err != nil {
		return nil, err
	}
	if e.cfg.Origins = nil; cfg.ReadOnly {
		e.readOnly()
		return e, nil
	}
	e.beginAttach()
	e.settle()
	return e, nil
}

// Step lets ev happen at now (a monotonic clock that also counts suspension)
// and appends the actions it causes to out.
func (e *Engine) Step(now time.Duration, ev Event, out *Out) {
	e.now, e.out = now, out
	switch ev := ev.(type) {
	case *Submit:
		for _, op := range ev.Ops {
			op.at = now
			if op.Kind != OpFlush {
				e.throttle.asked++
			}
			e.submit(op)
		}
	case *Replies:
		e.replies(ev)
	case *Up:
		e.linkUp(ev)
	case *Down:
		e.linkDown(ev)
	case *Lost:
		e.lost(ev)
	case *MetaDone:
		e.metaDone(ev)
	case *Lease:
		e.leased(ev.Until)
	case *Refresh:
		e.refresh(ev)
	case *Limit:
		e.limit = ev.Bytes
	case *Share:
		if e.throttle.share != *ev {
			e.throttle.share = *ev
			e.setBuckets()
		}
	case *Wish:
		e.wish(ev)
	case *Tick:
		e.tick()
	case *Detach:
		e.detach(ev.Force)
	case *Stay:
		if e.state == Draining && e.hand == nil {
			e.stay()
		}
	case *HandOver:
		e.beginHandOver(ev)
	case *Fence:
		if ev.Fenced {
			e.endFenced(ev.Why)
		} else {
			e.end(ev.Why)
		}
	case *Origins:
		if err := e.takeOrigins(ev.States, ev.Call); err != nil {
			e.end(err.Error())
		}
	case *Cut:
		e.beginCut(ev)
	case *Release:
		e.release(ev)
	case *List:
		e.beginList(ev)
	}
	e.settle()
}

// settle is the upkeep after each event: whatever has become possible is done.
func (e *Engine) settle() {
	if e.state == Ended {
		return
	}
	e.stepAttach()
	e.releaseHeld()
	e.startConfirm()
	e.startAllocate()
	e.startFlush()
	e.stepJoins()
	e.stepFills()
	e.startChange()
	e.stepCut()
	e.stepReclaim()
	e.startTelling()
	e.startMoves()
	e.stepDetach()
	e.stepHandOver()
	e.resumeCopies()
}

func (e *Engine) tick() {
	if e.state == Ended {
		return
	}
	e.watchStalls()
	e.bounceFailed()
	e.retryFull()
	e.retryStuck()
	e.retryViews()
	e.autoFlush()
	e.watchLag()
	e.planMoves()
	e.askDamage()
	e.compareNext()
}

// submit admits one operation, or keeps it until the volume serves.
func (e *Engine) submit(op *Op) {
	op.answered, op.next = false, nil // the shell may use an Op again
	switch e.state {
	case Attaching:
		e.waiting.push(op)
	case Serving:
		if !e.hold(op) {
			e.admit(op)
		}
	case Draining:
		if e.hand != nil { // it may yet stay here
			e.waiting.push(op)
			return
		}
		e.done(op, status.Shutdown)
	default:
		e.done(op, e.endedAs)
	}
}

// done tells the client, once: pieces of an operation may still be on their way
// when the end of the epoch answers it.
func (e *Engine) done(op *Op, k status.Kind) {
	if op.answered {
		return
	}
	op.answered = true
	e.throttle.note(op)
	e.note(op, k)
	e.out.Done = append(e.out.Done, Done{op, k})
}

// endFenced ends because another writer has the volume.
func (e *Engine) endFenced(why string) {
	if e.state != Ended {
		e.endedAs = status.Fenced
	}
	e.end(why)
}

// end refuses everything from now on. Nothing in flight is answered OK.
func (e *Engine) end(why string) {
	if e.state == Ended {
		return
	}
	e.state, e.why = Ended, why
	if e.endedAs == status.OK {
		e.endedAs = status.Shutdown
	}
	e.out.Sends = e.out.Sends[:0] // they refer to buffers that go back to the clients now
	for _, op := range e.unfinished() {
		e.done(op, e.endedAs)
	}
	e.waiting.takeAll()
	e.throttle.held.takeAll()
	e.throttle.heldOps = 0
	if e.cut != nil {
		e.endCut(CutGivenUp, why)
	}
	for _, r := range e.replicas {
		e.out.Links = append(e.out.Links, LinkAction{r.index, false})
	}
}

// unfinished lists every operation the engine owns, once each.
func (e *Engine) unfinished() []*Op {
	var ops []*Op
	seen := map[*Op]bool{}
	add := func(op *Op) {
		if op != nil && !seen[op] {
			seen[op] = true
			ops = append(ops, op)
		}
	}
	for op := e.waiting.head; op != nil; op = op.next {
		add(op)
	}
	for op := e.throttle.held.head; op != nil; op = op.next {
		add(op)
	}
	for _, rd := range e.viewing {
		add(rd.op)
	}
	if e.cut != nil {
		for op := e.cut.ops.head; op != nil; op = op.next {
			add(op)
		}
		for _, p := range e.cut.pieces {
			add(p.op)
		}
	}
	for _, c := range e.sortedChunks() {
		for _, j := range c.jobs {
			add(j.op)
			for _, w := range j.waiters {
				if w.read != nil {
					add(w.read.op)
				}
			}
		}
	}
	for _, i := range slices.Sorted(maps.Keys(e.alloc.pieces)) {
		for _, p := range e.alloc.pieces[i] {
			add(p.op)
		}
	}
	for _, op := range e.leaseHeld {
		add(op)
	}
	for _, op := range e.confirm.reads {
		add(op)
	}
	for _, rd := range e.stuck {
		add(rd.op)
	}
	for _, r := range e.replicas {
		for i := range r.slots {
			if rd := r.slots[i].read; rd != nil {
				add(rd.op)
			}
		}
	}
	for _, op := range e.flush.next {
		add(op)
	}
	for _, op := range e.flush.now {
		add(op)
	}
	return ops
}

// detach starts to let go: operations in flight finish first, unless it is forced.
func (e *Engine) detach(force bool) {
	switch {
	case e.state == Attaching:
		e.end("detached before it served")
		e.out.Meta = append(e.out.Meta, e.detachCall())
	case force && e.hand == nil && e.state != Ended:
		e.end("detached by force")
		e.out.Meta = append(e.out.Meta, e.detachCall())
	case e.state == Serving:
		e.state, e.why = Draining, "detaching"
		e.flush.wanted = true
	}
}

func (e *Engine) detachCall() *MetaCall {
	return &MetaCall{Detach: &pb.Detach{VolumeId: uint64(e.volume), Epoch: uint32(e.epoch)}}
}

// stepDetach lets go once nothing is in flight and all is durable.
func (e *Engine) stepDetach() {
	if e.state != Draining || e.hand != nil || e.flush.running || len(e.unfinished()) > 0 || e.flush.running || e.flush.wanted || e.dirty() || e.member.call != nil || e.alloc.call != nil {
		return
	}
	e.out.Meta = append(e.out.Meta, e.detachCall())
	e.end("detached")
}

// leased extends the read lease and lets waiting reads go.
func (e *Engine) leased(until time.Duration) {
	e.leaseTill = max(e.leaseTill, until)
	if e.now >= e.leaseTill || e.state == Ended {
		return
	}
	held := append(e.confirm.reads, e.leaseHeld...)
	e.leaseHeld, e.confirm.reads, e.confirm.need = nil, nil, 0
	e.readsDone(held)
}

// refresh takes the volume as metadata knows it. Older news is ignored.
func (e *Engine) refresh(ev *Refresh) {
	v := ev.Volume
	if e.state == Ended || v == nil {
		return
	}
	if ids.Epoch(v.Epoch) > e.epoch {
		e.endFenced(fmt.Sprintf("epoch %d was given to %s", v.Epoch, v.HolderHost))
		return
	}
	if ids.Epoch(v.Epoch) < e.epoch || v.Revision < e.revision {
		return
	}
	e.takeSize(v, ev.Chunks, ev.Whole)
	e.setQos(v.Qos)
	e.layers.take(v)
	e.noteVolume(v)
	if v.Origin == nil && !e.cfg.ReadOnly { // it was flattened
		e.origins = nil
	}
	e.member.news = v
	e.takeNews()
}
