package stream

import (
	"io"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Bounds of a reader's buffer. It doubles while reads fill it, takes a frame of
// any legal size, and shrinks again when fills have stayed small for a while.
const (
	minBuffer   = 16 << 10
	maxBuffer   = 256 << 10
	shrinkAfter = 256 // small fills in a row
)

// MaxFrame is the largest frame.
const MaxFrame = wire.HeaderBytes + wire.MaxBody + wire.MaxData

// Reader cuts a byte stream into frames.
//
//	0 ≤ begin ≤ end ≤ len(buf) ≤ max(maxBuffer, one frame)
type Reader struct {
	src        io.Reader
	buf        []byte
	begin, end int
	limit      int // bytes of the largest frame taken
	want       int // bytes the frame at begin needs, once its header is known
	small      int // fills in a row that used less than a quarter
	full       bool
}

// NewReader returns a reader of src.
func NewReader(src io.Reader) *Reader {
	return &Reader{src: src, buf: make([]byte, minBuffer), limit: MaxFrame}
}

// Limit makes frames over n bytes an error from now on, before room is made for
// them: a stranger gets no more than his greeting needs.
func (r *Reader) Limit(n int) { r.limit = n }

// Frame is one frame. Body and Data are valid until the next Fill.
type Frame struct {
	wire.Header
	Body, Data []byte
}

// Next returns the next whole frame of what is buffered; false when Fill has to
// bring more. After an error the stream is useless.
func (r *Reader) Next() (Frame, bool, error) {
	b := r.buf[r.begin:r.end]
	if len(b) < wire.HeaderBytes || len(b) < r.want {
		return Frame{}, false, nil
	}
	h, err := wire.ParseHeader(b)
	if err != nil {
		return Frame{}, false, err
	}
	n := wire.HeaderBytes + h.BodyLen + h.DataLen
	if n > r.limit {
		return Frame{}, false, status.Errorf(status.TooBig, "a frame of %d bytes where at most %d are taken", n, r.limit)
	}
	if len(b) < n {
		r.want = n
		return Frame{}, false, nil
	}
	body := wire.HeaderBytes + h.BodyLen
	r.begin, r.want = r.begin+n, 0
	return Frame{h, b[wire.HeaderBytes:body:body], b[body:n:n]}, true, nil
}

// Fill waits for more bytes. io.EOF is an end between frames.
func (r *Reader) Fill() error {
	r.fit()
	n, err := r.src.Read(r.buf[r.end:])
	r.end += n
	r.full = r.end == len(r.buf)
	switch {
	case n > 0:
		return nil // an error comes again
	case err == io.EOF && r.begin < r.end:
		return io.ErrUnexpectedEOF
	case err == nil:
		return io.ErrNoProgress
	}
	return err
}

// fit makes room at the end: it moves what is left to the front, and gives the
// buffer the size that its use asks for.
func (r *Reader) fit() {
	size := len(r.buf)
	if r.end*4 > size {
		r.small = 0
	} else {
		r.small++
	}
	switch {
	case r.want > size:
		size = max(r.want, minBuffer)
	case r.full && size < maxBuffer:
		size = min(2*size, maxBuffer)
	case r.small >= shrinkAfter && size > minBuffer:
		size, r.small = max(size/4, minBuffer, r.want), 0
	}
	left := r.buf[r.begin:r.end]
	if size != len(r.buf) && len(left) < size {
		r.buf = make([]byte, size)
	} else if r.begin == 0 {
		return
	}
	r.begin, r.end = 0, copy(r.buf, left)
}

// Window is how many bytes of cost (Cost) one connection may have outstanding:
// a client holds back what is above it, and a server reads no further, so that
// a ping never waits behind bytes the server does not take. One request alone
// may exceed it.
const Window = 16 << 20

// Cost is what a request takes of the server's memory while it is outstanding:
// itself, and the most its reply can be.
func Cost(q *wire.Request) int {
	n := 512 + len(q.Data) + 4*len(q.Sums) + 32*len(q.Entries)
	switch q.Kind {
	case wire.Read:
		if q.Flags&wire.FlagNoData == 0 {
			n += int(min(q.Count, wire.MaxIO)) * ids.BlockSize
		}
		if q.Flags&wire.FlagEntries != 0 {
			n += int(min(q.Count, wire.MaxIO)) * 32
		}
	case wire.Newer:
		if q.Count == 0 {
			return n + wire.MaxBody
		}
		n += int(min(q.Count, wire.MaxEntries)) * 32
	case wire.List:
		n += int(min(q.Count, wire.MaxEntries)) * 32
	case wire.Digest:
		n += int(min(q.Count/wire.DigestBlocks+1, wire.MaxBody/8)) * 8
	}
	return n
}

// Request decodes the frame as a request; Data is a part of the frame.
func (f *Frame) Request() (*wire.Request, error) {
	q, err := wire.DecodeRequest(f.Header, f.Body)
	if err != nil {
		return nil, err
	}
	q.Data = f.Data
	return q, nil
}

// Reply decodes the frame as a reply, with a copy of the data.
func (f *Frame) Reply() (*wire.Reply, error) {
	r, err := wire.DecodeReply(f.Header, f.Body)
	if err != nil {
		return nil, err
	}
	if len(f.Data)%ids.BlockSize != 0 {
		return nil, status.Errorf(status.Invalid, "%s reply with a broken block", r.Kind)
	}
	if len(f.Data) > 0 {
		r.Data = append([]byte(nil), f.Data...)
	}
	return r, nil
}
