package server

import (
	"io"
	"sync"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/socket"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// Stages of transmission; the functions stand in this order.
//
//  1. transmit   the reader's loop: everything received becomes one batch
//  2. decode     headers and payloads leave the receive buffer
//  3. door       a request is checked once, and finds room in the budget
//  4. submit     the batch goes to the volume in one call
//  5. fill       the next read of the socket
//  6. Complete   operations come back, from any goroutine, in any order
//  7. answer     a reply is encoded into the request's own header space
//  8. Sent       the reply is in the kernel: memory and budget are free again
//
// A request costs no goroutine and, while its volume answers inline, no
// hand-off between any. Replies are combined: a batch that comes back together
// is one writev.

// bufferBytes is the receive buffer of a connection: at depth 32 a batch of
// 4 KiB writes fits. Its pages are touched only as far as they are used.
const bufferBytes = 160 << 10

// request is one command from its header to its sent reply.
type request struct {
	op      volume.Op
	more    []volume.Op // the second and later operations of a provisioning
	parts   int         // operations not yet given back; guarded by c.mu
	failed  status.Kind // first failure of an operation; guarded by c.mu
	c       *conn
	req     nbd.Request
	buf     *buffer       // data of a read or write
	asked   bool          // the volume has, or has had, its operations
	held    int           // bytes of the connection's budget
	at      time.Duration // it was read off the socket, in the server's time
	data    []byte        // what follows the header of the reply
	headLen int
	head    [headBytes]byte
}

// headBytes hold every reply header, an error with its text included.
const headBytes = 72

const (
	provisionPiece = 1 << 20  // bytes of zeros one operation of a provisioning writes
	provisionHeld  = 16 << 10 // bytes of the budget each of them counts for: 4 GiB fill the default budget
	cacheBytes     = 1 << 20  // a CACHE hint is followed so far
	maxExtents     = 4 << 10  // of one BLOCK_STATUS reply; the client asks on from where it ends
	statusBytes    = 64 << 20 // of the export that one BLOCK_STATUS reply describes block by block
)

// zeros is what provisioning writes; volumes only read it.
var zeros [provisionPiece]byte

var requests = sync.Pool{New: func() any { return new(request) }}

// transmit is the reader: it returns when the connection is to end.
func (c *conn) transmit() error {
	for {
		err := c.decode()
		if serr := c.submit(); serr != nil {
			return serr
		}
		if err != nil {
			return err
		}
		if err := c.fill(); err != nil {
			return err
		}
	}
}

// decode takes every request off the receive buffer whose header is there.
func (c *conn) decode() error {
	c.door.Size = c.vol.Size()
	for c.w-c.r >= nbd.RequestSize {
		req, ok := nbd.ParseRequest(c.buf[c.r:c.w])
		if !ok {
			return status.Errorf(status.Invalid, "the client is out of step: no request magic")
		}
		if req.Type == nbd.CmdDisc {
			return errBye
		}
		if req.Type == nbd.CmdWrite && req.Len > nbd.MaxPayload {
			return status.Errorf(status.TooBig, "the client sends a write of %d bytes, more than %d", req.Len, nbd.MaxPayload)
		}
		c.r += nbd.RequestSize
		if err := c.take(req); err != nil {
			return err
		}
	}
	return nil
}

// take checks a request at the door and makes it part of the batch.
func (c *conn) take(req nbd.Request) error {
	kind := c.door.Check(req)
	held := 0
	if req.Type == nbd.CmdWrite || kind == status.OK {
		held = cost(req)
	}
	refusing, err := c.reserve(held)
	if err != nil {
		return err
	}
	if refusing {
		kind = status.Shutdown
	}
	r := requests.Get().(*request) // zero
	r.c, r.req, r.held, r.at = c, req, held, c.readAt
	if req.Type == nbd.CmdWrite {
		if err := c.payload(r, kind == status.OK); err != nil {
			c.release(r)
			return err
		}
	}
	switch {
	case kind != status.OK:
		r.failed = kind
		r.answer(kind)
		c.answered = append(c.answered, r)
	case req.Type == nbd.CmdBlockStatus && c.largeHole(r):
		c.answered = append(c.answered, r)
	default:
		r.prepare()
		c.batch = append(c.batch, r)
	}
	return nil
}

// cost is how much of the budget a request takes.
func cost(req nbd.Request) int {
	switch {
	case req.Type == nbd.CmdRead || req.Type == nbd.CmdWrite:
		return int(req.Len)
	case req.Type == nbd.CmdCache:
		return int(min(req.Len, cacheBytes))
	case req.Type == nbd.CmdBlockStatus:
		return maxExtents * nbd.ExtentSize
	case provisions(req):
		return (int(req.Len)/provisionPiece + 2) * provisionHeld
	}
	return 0
}

// provisions says that zeros are to be written for real: the client wants the
// space to be there.
func provisions(req nbd.Request) bool {
	return req.Type == nbd.CmdWriteZeroes && req.Flags&nbd.CmdNoHole != 0
}

// payload reads a write's data, or reads over it. What was decoded before is
// submitted first if the data is still on its way.
func (c *conn) payload(r *request, want bool) error {
	n := int(r.req.Len)
	if want {
		r.buf = getBuffer(n)
	}
	have := min(n, c.w-c.r)
	if want {
		copy(r.buf.b, c.buf[c.r:c.r+have])
	}
	c.r += have
	if have == n {
		return nil
	}
	if err := c.submit(); err != nil {
		return err
	}
	var err error
	if want {
		_, err = io.ReadFull(c.nc, r.buf.b[have:n])
	} else {
		_, err = io.CopyN(io.Discard, c.nc, int64(n-have))
	}
	if isDeadline(err) { // kicked: the request stays unanswered
		return errLeaving
	}
	c.readAt = c.s.now()
	return err
}

// reserve finds room for one more request with n bytes of data, and says
// whether it is to be refused because the export leaves. While there is none
// the socket is not read; if that lasts longer than Unread, the connection
// ends.
func (c *conn) reserve(n int) (refusing bool, err error) {
	c.mu.Lock()
	if c.room(n) {
		c.requests++
		c.bytes += n
		refusing = c.leaving == leaveRefusing
		c.mu.Unlock()
		return refusing, nil
	}
	c.mu.Unlock()
	if err := c.submit(); err != nil { // what would free the room must be under way
		return false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stalled, c.waiting = false, true
	defer func() { c.waiting = false }()
	t := time.AfterFunc(c.s.cfg.Unread, c.stall)
	defer t.Stop()
	for !c.room(n) {
		if c.stalled {
			return false, status.Errorf(status.Timeout, "requests lay unread for %v with %d requests and %d bytes in flight: the client must send them again", c.s.cfg.Unread, c.requests, c.bytes)
		}
		if c.leaving == leaveSilently {
			return false, errLeaving
		}
		c.moved.Wait()
	}
	c.requests++
	c.bytes += n
	return c.leaving == leaveRefusing, nil
}

// room says whether a request of n bytes fits; c.mu is held.
func (c *conn) room(n int) bool {
	return c.requests < c.s.cfg.MaxRequests && (c.bytes+n <= c.s.cfg.MaxBytes || c.bytes == 0)
}

func (c *conn) stall() {
	c.mu.Lock()
	c.stalled = true
	c.mu.Unlock()
	c.moved.Broadcast()
}

// prepare makes the volume's operations of a request.
func (r *request) prepare() {
	r.op = volume.Op{Off: r.req.Off, Len: uint64(r.req.Len), FUA: r.req.Flags&nbd.CmdFUA != 0, User: r.c}
	r.parts, r.failed, r.asked = 1, status.OK, true
	switch r.req.Type {
	case nbd.CmdRead, nbd.CmdCache:
		r.op.Kind = volume.OpRead
		r.op.Len = uint64(r.held)
		r.buf = getBuffer(r.held)
		r.op.Data = r.buf.b[:r.held]
	case nbd.CmdWrite:
		r.op.Kind = volume.OpWrite
		r.op.Data = r.buf.b[:r.req.Len]
	case nbd.CmdBlockStatus:
		r.describe()
	case nbd.CmdTrim:
		r.op.Kind = volume.OpTrim
	case nbd.CmdWriteZeroes:
		r.op.Kind = volume.OpZero
		if provisions(r.req) {
			r.provision()
		}
	case nbd.CmdFlush:
		r.op.Kind, r.op.Off, r.op.Len = volume.OpFlush, 0, 0
	}
}

// provision cuts a zeroing into writes. All go to the volume in one batch:
// were the later ones sent as the earlier ones come back, they could land
// behind what a client, reconnected, has written since.
func (r *request) provision() {
	off, end := r.op.Off, r.op.Off+r.op.Len
	next := func() volume.Op {
		op := r.op
		stop := min(end, off-off%provisionPiece+provisionPiece)
		op.Kind, op.Off, op.Len, op.Data = volume.OpWrite, off, stop-off, zeros[:stop-off]
		off = stop
		return op
	}
	first := next()
	for off < end {
		r.more = append(r.more, next())
	}
	r.op, r.parts = first, 1+len(r.more)
}

// submit hands the batch to the volume and sends what the door has answered.
// Requests that lay in the socket while the process stood still are not
// submitted: their client may have given them up.
func (c *conn) submit() error {
	c.sendAnswered()
	if len(c.batch) == 0 {
		return nil
	}
	now := c.s.now()
	if c.s.frozeSince(c.freezes, now) {
		return status.Errorf(status.Timeout, "the server stood still for longer than %v: the client must send its requests again", c.s.cfg.Unread)
	}
	c.mu.Lock()
	for _, r := range c.batch {
		c.enter(&r.op, r, now)
		for i := range r.more {
			c.enter(&r.more[i], r, now)
		}
	}
	c.mu.Unlock()
	clear(c.batch)
	c.batch = c.batch[:0]
	c.vol.Submit(c.ops)
	clear(c.ops)
	c.ops = c.ops[:0]
	return nil
}

// enter notes an operation as in flight; c.mu is held.
func (c *conn) enter(op *volume.Op, r *request, now time.Duration) {
	op.Waited = now - r.at
	c.inFlight[op] = r
	c.ops = append(c.ops, op)
}

// sendAnswered sends the replies of requests that never went to the volume.
func (c *conn) sendAnswered() {
	if len(c.answered) == 0 {
		return
	}
	now := c.s.now()
	c.out.Lock()
	c.mu.Lock()
	for _, r := range c.answered {
		c.stats.Note(r.req.Type, r.req.Len, now-r.at, r.failed != status.OK)
		c.out.Add(r.head[:r.headLen], r.data, r)
	}
	c.mu.Unlock()
	c.out.Unlock()
	clear(c.answered)
	c.answered = c.answered[:0]
}

// fill reads what the socket has, at least one byte.
func (c *conn) fill() error {
	c.w = copy(c.buf, c.buf[c.r:c.w]) // a header's part at most
	c.r = 0
	if c.s.now()-c.readAt > c.s.cfg.Unread {
		return status.Errorf(status.Timeout, "the volume took no requests for %v: the client must send them again", c.s.cfg.Unread)
	}
	for {
		n, err := c.nc.Read(c.buf[c.w:])
		c.w += n
		c.readAt = c.s.now()
		switch {
		case n > 0 && c.left(): // it overtook the wake-up: unread, as far as the client can tell
			return errLeaving
		case n > 0:
			return nil
		case err == nil:
			continue
		case !isDeadline(err):
			return err
		}
		if err := c.kicked(); err != nil {
			return err
		}
	}
}

// kicked decides what a wake-up means: reading goes on while requests are in
// flight that the client is still to be told of.
func (c *conn) kicked() error {
	if err := c.nc.SetReadDeadline(time.Time{}); err != nil { // before looking: a later kick stands
		return err
	}
	if c.left() {
		return errLeaving
	}
	return nil
}

// left says whether the reader is to stop.
func (c *conn) left() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaving == leaveSilently || (c.leaving == leaveRefusing && len(c.inFlight) == 0)
}

var _ volume.Completer = (*conn)(nil)

// Complete takes operations back from the volume and sends the replies of the
// requests they finish.
func (c *conn) Complete(ds []volume.Done) {
	now := c.s.now()
	c.out.Lock()
	c.mu.Lock()
	for _, d := range ds {
		r := c.inFlight[d.Op]
		if r == nil {
			c.s.log.Error("nbd: the volume gave an operation back twice", "export", c.name, "offset", d.Op.Off)
			continue
		}
		delete(c.inFlight, d.Op)
		if d.Status != status.OK && r.failed == status.OK {
			r.failed = d.Status
		}
		if r.parts--; r.parts == 0 {
			r.answer(r.failed)
			c.stats.Erred(r.failed, now)
			c.stats.Note(r.req.Type, r.req.Len, now-r.at, r.failed != status.OK)
			c.out.Add(r.head[:r.headLen], r.data, r)
		}
	}
	last, leaving := len(c.inFlight) == 0, c.leaving != staying
	c.mu.Unlock()
	c.out.Unlock()
	if last {
		c.moved.Broadcast()
		if leaving {
			c.kick()
		}
	}
}

// answer encodes the reply. Data is sent from the request's buffer.
func (r *request) answer(kind status.Kind) {
	head, cookie := r.head[:0], r.req.Cookie
	errno, structured := status.NBD(kind), r.c.door.Structured
	r.data = nil
	switch {
	case r.req.Type == nbd.CmdBlockStatus && (errno == 0 || kind == status.IO): // what nobody can read is data
		r.headLen = r.extents(kind == status.OK)
		return
	case errno != 0 && structured:
		head = nbd.AppendError(head, cookie, errno, kind.String())
	case errno != 0:
		head = nbd.AppendSimple(head, cookie, errno)
	case r.req.Type == nbd.CmdRead && structured:
		head, r.data = nbd.AppendDataHead(head, cookie, r.req.Off, r.req.Len), r.buf.b[:r.req.Len]
	case r.req.Type == nbd.CmdRead:
		head, r.data = nbd.AppendSimple(head, cookie, 0), r.buf.b[:r.req.Len]
	default:
		head = nbd.AppendSimple(head, cookie, 0)
	}
	r.headLen = len(head)
}

// largeHole answers a BLOCK_STATUS that begins in a large hole of the thin map,
// at once.
func (c *conn) largeHole(r *request) bool {
	x := c.vol.Extents(r.req.Off, uint64(r.req.Len))[0]
	if !x.Hole || x.Len < min(uint64(r.req.Len), statusBytes) {
		return false
	}
	r.data = nbd.AppendExtent(r.data, nbd.Extent{Len: uint32(x.Len), State: nbd.StateHole | nbd.StateZero})
	r.headLen = len(nbd.AppendStatusHead(r.head[:0], r.req.Cookie, c.door.AllocID, 1))
	return true
}

// describe asks the volume how the blocks from the request's offset on are stored.
func (r *request) describe() {
	from := r.req.Off - r.req.Off%ids.BlockSize
	to := min(r.req.Off+uint64(r.req.Len)+ids.BlockSize-1, from+statusBytes, r.c.vol.Size()/ids.BlockSize*ids.BlockSize)
	blocks := (max(to, from) - from) / ids.BlockSize
	r.buf = getBuffer(int(blocks) + 1)
	r.op.Kind, r.op.Off, r.op.Len, r.op.States = volume.OpRead, from, blocks*ids.BlockSize, r.buf.b[:blocks]
}

// extents encodes how blocks are stored, as the volume has said it, or as data;
// it returns the length of the header.
func (r *request) extents(known bool) int {
	limit := maxExtents
	if r.req.Flags&nbd.CmdReqOne != 0 {
		limit = 1
	}
	end := r.req.Off + uint64(r.req.Len)
	count, left := 0, r.op.States
	if !known || len(left) == 0 { // a volume's last bytes may be less than a block
		left = nil
		r.data = nbd.AppendExtent(r.data, nbd.Extent{Len: r.req.Len})
		count = 1
	}
	for at := r.req.Off; len(left) > 0 && at < end && count < limit; count++ {
		n := 1
		for n < len(left) && left[n] == left[0] {
			n++
		}
		e := nbd.Extent{}
		if left[0] == volume.BlockHole {
			e.State = nbd.StateHole | nbd.StateZero
		}
		left = left[n:]
		stop := min(end, r.op.Off+r.op.Len-uint64(len(left))*ids.BlockSize)
		e.Len = uint32(stop - at)
		r.data = nbd.AppendExtent(r.data, e)
		at = stop
	}
	return len(nbd.AppendStatusHead(r.head[:0], r.req.Cookie, r.c.door.AllocID, count))
}

var _ socket.Owner = (*request)(nil)

// Sent frees what the request held: its reply needs it no more.
func (r *request) Sent() { r.c.release(r) }

// release gives a request's memory and budget back. One that failed in the
// volume is left to the collector: an engine whose epoch has ended answers operations
// that some replica's sender may still be reading from.
func (c *conn) release(r *request) {
	c.mu.Lock()
	c.requests--
	c.bytes -= r.held
	waiting := c.waiting
	c.mu.Unlock()
	if waiting {
		c.moved.Broadcast()
	}
	if r.failed != status.OK && r.asked {
		return
	}
	if r.buf != nil {
		r.buf.put()
	}
	*r = request{}
	requests.Put(r)
}
