package volume

import (
	"math/bits"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// maxReplicas bounds the replicas of one chunk, joining ones included.
const maxReplicas = 8

// job is one write or zeroing of consecutive blocks of one chunk, from its
// arrival to its last answer.
//
//	version ≠ 0 ⇔ issued;  have ⊆ need ∪ joining;  done ⇔ issued ∧ need ⊆ have
//	reusable ⇔ done ∧ unanswered = 0 ∧ ¬orphan
type job struct {
	op         *Op
	piece      piece
	c          *chunk
	first      ids.Block
	count      uint32
	version    ids.Version
	layer      ids.LayerID
	merging    bool   // covers blocks in part, and is not issued
	merged     []byte // whole blocks of such a write
	after      int    // jobs that must finish before it begins
	edges      int    // edge reads outstanding
	need, have uint16 // bit i: c.replicas[i] must accept, has accepted
	sent       uint16 // an answer is outstanding
	unanswered int
	done       bool
	full       bool // listed in fullState
	orphan     bool // a connection went with a request of it: it is never used again
	startedAt  time.Duration
	waiters    []waiter
	sums       []uint32
	reqs       []wire.Request // by position; whose they are says Send
	legs       legs           // by position
	prev, next *job
}

// waiter is what goes on when a job is complete: a job that begins then, or
// a read that has its data and may be answered then.
type waiter struct {
	job  *job
	read *read
}

func (j *job) overlaps(first ids.Block, count uint32) bool {
	return first < j.first+ids.Block(j.count) && j.first < first+ids.Block(count)
}

func (j *job) zero() bool { return j.op.Kind != OpWrite && j.merged == nil }

// jobList is a list in version order; appending keeps it because versions rise.
type jobList struct {
	root job
	len  int
}

func (l *jobList) init()       { l.root.prev, l.root.next = &l.root, &l.root }
func (l *jobList) empty() bool { return l.root.next == &l.root }

// lowest returns the lowest version in flight, or MaxVersion.
func (l *jobList) lowest() ids.Version {
	if l.empty() {
		return ids.MaxVersion
	}
	return l.root.next.version
}

func (l *jobList) push(j *job) {
	j.prev, j.next = l.root.prev, &l.root
	j.prev.next, l.root.prev = j, j
	l.len++
}

func (l *jobList) remove(j *job) {
	j.prev.next, j.next.prev = j.next, j.prev
	j.prev, j.next = nil, nil
	l.len--
}

// all returns the jobs in version order, safe against changes of the list.
func (l *jobList) all() []*job {
	out := make([]*job, 0, l.len)
	for j := l.root.next; j != &l.root; j = j.next {
		out = append(out, j)
	}
	return out
}

// newJob makes a job that is already visible to overlapping operations.
func (e *Engine) newJob(c *chunk, p piece, first ids.Block, count uint32) *job {
	var j *job
	if n := len(e.freeJobs); n > 0 {
		j = e.freeJobs[n-1]
		e.freeJobs = e.freeJobs[:n-1]
	} else {
		j = &job{}
	}
	sums, waiters, reqs := j.sums[:0], j.waiters[:0], j.reqs
	if len(reqs) < len(c.replicas) {
		reqs = make([]wire.Request, len(c.replicas))
	}
	*j = job{op: p.op, piece: p, c: c, first: first, count: count, startedAt: e.now, sums: sums, waiters: waiters, reqs: reqs}
	c.jobs = append(c.jobs, j)
	e.openJobs++
	return j
}

// merge reads the partly covered blocks at the edges, and issues once it has
// them. No overlapping write is under way meanwhile.
func (e *Engine) merge(j *job) {
	j.merged = make([]byte, int(j.count)*ids.BlockSize)
	chunkBytes := uint64(e.perChunk) * ids.BlockSize
	begin := j.piece.off % chunkBytes
	end := begin + j.piece.n
	last := j.first + ids.Block(j.count) - 1
	if j.op.Kind == OpCopy {
		j.edges = 1
		rd := e.newRead()
		rd.op, rd.c, rd.first, rd.count, rd.job, rd.piece = j.op, j.c, j.first, j.count, j, j.piece
		e.sendRead(rd)
		return
	}
	var edges []ids.Block
	if begin%ids.BlockSize != 0 || j.count == 1 {
		edges = append(edges, j.first)
	}
	if end%ids.BlockSize != 0 && (last != j.first || len(edges) == 0) {
		edges = append(edges, last)
	}
	j.edges = len(edges)
	for _, b := range edges {
		rd := e.newRead()
		rd.op, rd.c, rd.first, rd.count, rd.job, rd.piece = j.op, j.c, b, 1, j, j.piece
		e.sendRead(rd)
	}
}

// edgeRead takes one edge block of a merge.
func (e *Engine) edgeRead(rd *read, data []byte, k status.Kind) {
	j := rd.job
	if k != status.OK {
		if j.op.failed == status.OK {
			j.op.failed = k
		}
	} else {
		copy(j.merged[uint64(rd.first-j.first)*ids.BlockSize:], data)
	}
	if j.edges--; j.edges > 0 {
		return
	}
	if j.op.failed != status.OK { // nothing was sent: it may fail
		e.finish(j, j.op.failed)
		return
	}
	if j.op.Kind == OpCopy {
		if j.merging = false; rd.shown {
			e.issue(j)
		} else {
			e.finish(j, status.OK)
		}
		return
	}
	at := j.piece.off % (uint64(e.perChunk) * ids.BlockSize) % ids.BlockSize
	if j.op.Kind == OpWrite {
		copy(j.merged[at:], j.piece.data())
	} else {
		clear(j.merged[at : at+j.piece.n])
	}
	j.merging = false
	e.issue(j)
}

// issue gives the job its version and sends it to every replica that takes
// writes. What must accept it is decided here and only shrinks by a committed
// exclusion, or grows when a joiner becomes required.
func (e *Engine) issue(j *job) {
	if e.counter >= ids.MaxCounter {
		e.end("the epoch's versions are used up; attach again")
		return
	}
	e.counter++
	j.version, j.layer = ids.MakeVersion(e.epoch, e.counter), e.layers.top
	if !j.zero() {
		data := j.data()
		for i := range j.count {
			block := data[int(i)*ids.BlockSize : int(i+1)*ids.BlockSize]
			j.sums = append(j.sums, wire.BlockSum(e.volume, j.c.id, j.layer, j.first+ids.Block(i), j.version, block))
		}
	}
	e.inFlight.push(j)
	for pos := range j.c.replicas {
		if j.c.required(pos) {
			j.need |= 1 << pos
		}
		e.sendJob(j, pos)
	}
	e.check(j) // nobody may be required when every member is out
}

func (j *job) data() []byte {
	if j.merged != nil {
		return j.merged
	}
	return j.piece.data()
}

// sendJob sends the job to one replica if it takes writes and has none of it.
func (e *Engine) sendJob(j *job, pos int) {
	r, bit := j.c.replicas[pos], uint16(1)<<pos
	if (j.have|j.sent)&bit != 0 || !r.writable() || (r.join != nil && j.version < r.join.from) {
		return
	}
	if f := j.c.fills[pos]; f != nil && !f.takes(j.version) {
		return
	}
	var q *wire.Request
	if pos < len(j.reqs) {
		q = &j.reqs[pos]
	}
	if j.orphan || q == nil { // the old one may still be with the connection that went
		q = new(wire.Request)
	}
	*q = wire.Request{Kind: wire.Write, Chunk: j.c.id, Layer: j.layer, Block: j.first, Count: j.count, Version: j.version}
	if j.zero() {
		q.Kind = wire.Zero
	} else {
		q.Sums, q.Data = j.sums, j.data()
		if !j.c.required(pos) { // the client may have its buffer back before a joiner has sent it
			q.Data = append([]byte(nil), q.Data...)
		}
	}
	j.sent |= bit
	j.legs[pos] = leg{sent: e.now}
	j.unanswered++
	e.send(r, q, slot{job: j, pos: pos})
}

// accepted takes a replica's answer to a job.
func (e *Engine) accepted(r *replica, j *job, pos int, rep *wire.Reply) {
	bit := uint16(1) << pos
	j.sent &^= bit
	j.unanswered--
	switch rep.Status {
	case status.OK:
		j.have |= bit
		if !j.done {
			e.check(j)
		}
	case status.NoSpace:
		if f := j.c.fills[pos]; f != nil && !f.asked {
			e.failFill(f, "no space")
		} else if r.inSync {
			e.isFull(j)
		} else {
			e.abortJoin(r, "no space")
		}
	default:
		f, dropped := j.c.fills[pos], rep.Status == status.NotFound
		switch {
		case j.c.replicas[pos] != r || f == nil && dropped && !j.c.shows(r): // its copy has moved away, or may have
		case f != nil && dropped && !f.asked: // this came before what says that the chunk is back
			e.failFill(f, rep.Detail)
		default:
			e.replicaFailed(r, rep)
		}
	}
	e.recycle(j)
}

// orphaned: the connection went before the answer came. The next one brings
// the job again (resume).
func (e *Engine) orphaned(j *job, pos int) {
	j.sent &^= 1 << pos
	j.unanswered--
	j.orphan = true
}

// check completes a job that every required replica has accepted.
func (e *Engine) check(j *job) {
	if j.done || j.need&^j.have != 0 || j.need == 0 {
		return
	}
	e.inFlight.remove(j)
	e.flush.dirty += uint64(j.count) * ids.BlockSize
	if e.flush.dirty >= flushBytes {
		e.flush.wanted = true
	}
	e.stats.MaxWriteStall = max(e.stats.MaxWriteStall, e.now-j.startedAt)
	e.pace.guest(e.now, e.now-j.startedAt)
	e.finish(j, status.OK)
}

// finish takes the job from its chunk, ends its piece and wakes who waited.
func (e *Engine) finish(j *job, k status.Kind) {
	j.done = true
	e.openJobs--
	for i, o := range j.c.jobs {
		if o == j {
			last := len(j.c.jobs) - 1
			j.c.jobs[i] = j.c.jobs[last]
			j.c.jobs[last] = nil
			j.c.jobs = j.c.jobs[:last]
			break
		}
	}
	if j.full {
		e.notFull(j)
	}
	e.cause = cause{legs: &j.legs, replicas: j.c.replicas}
	e.partDone(j.op, k)
	e.cause = cause{}
	for i := 0; i < len(j.waiters); i++ {
		switch w := j.waiters[i]; {
		case w.read != nil:
			e.answerRead(w.read)
		default:
			if w.job.after--; w.job.after == 0 && e.state != Ended {
				e.begin(w.job)
			}
		}
	}
	clear(j.waiters)
	j.waiters = j.waiters[:0]
	e.recycle(j)
}

// freeMax bounds the jobs, and the reads, that are kept for later.
const freeMax = 256

// recycle keeps a finished job nobody refers to for the next one.
func (e *Engine) recycle(j *job) {
	if j.done && j.unanswered == 0 && !j.orphan && j.c != nil && len(e.freeJobs) < freeMax {
		j.c, j.op, j.merged, j.piece = nil, nil, nil, piece{}
		e.freeJobs = append(e.freeJobs, j)
	}
}

// fullState holds the writes that found a store full. While there are any, new
// writes are refused, and so none of them is ever sent to fail; these wait,
// because a write once sent does not fail. Bounded by the operations in flight.
type fullState struct {
	jobs []*job
	at   time.Duration // they were sent last
}

func (e *Engine) isFull(j *job) {
	if j.done || j.full {
		return
	}
	j.full = true
	if len(e.full.jobs) == 0 {
		e.full.at = e.now
	}
	e.full.jobs = append(e.full.jobs, j)
}

func (e *Engine) notFull(j *job) {
	j.full = false
	for i, o := range e.full.jobs {
		if o == j {
			e.full.jobs = append(e.full.jobs[:i], e.full.jobs[i+1:]...)
			return
		}
	}
}

// fullOn names the hosts whose stores the waiting writes lack.
func (e *Engine) fullOn() (hosts []string) {
	for _, j := range e.full.jobs {
		for pos, r := range j.c.replicas {
			if (j.need&^j.have)&(1<<pos) != 0 && !slices.Contains(hosts, r.host) {
				hosts = append(hosts, r.host)
			}
		}
	}
	slices.Sort(hosts)
	return hosts
}

// retryFull asks again whether there is room. A store that alone has none for
// long is excluded; when several have none, space has to come back.
func (e *Engine) retryFull() {
	if len(e.full.jobs) == 0 || e.now-e.full.at < spaceRetry {
		return
	}
	e.full.at = e.now
	for _, j := range append([]*job(nil), e.full.jobs...) {
		if lacking := j.need &^ j.have; e.now-j.startedAt >= spacePatience && lacking != 0 && lacking&(lacking-1) == 0 {
			r := j.c.replicas[bits.TrailingZeros16(lacking)]
			if r.sealed && j.sent&lacking == 0 && e.mayExclude([]*replica{r}) {
				e.exclude(r, "no space, and the others have")
			}
		}
		for pos := range j.c.replicas {
			e.sendJob(j, pos)
		}
	}
}
