package wire

import (
	"encoding/binary"
	"io"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	magic        = 0x314e5243 // "CRN1"
	requestFixed = 80
	replyFixed   = 72
	entryBytes   = 32
	maxDetail    = 1 << 10
)

var le = binary.LittleEndian

// AppendRequest appends the header and body of q to dst. The caller sends
// q.Data right after it.
func AppendRequest(dst []byte, q *Request) []byte {
	start := len(dst)
	dst = append(dst, make([]byte, HeaderBytes)...)
	dst = append(dst, q.Store[:]...)
	dst = le.AppendUint64(dst, uint64(q.Volume))
	dst = le.AppendUint64(dst, uint64(q.Chunk))
	dst = le.AppendUint64(dst, uint64(q.Version))
	dst = le.AppendUint64(dst, uint64(q.Floor))
	dst = le.AppendUint64(dst, uint64(q.Limit))
	dst = le.AppendUint32(dst, uint32(q.Layer))
	dst = le.AppendUint32(dst, uint32(q.Epoch))
	dst = le.AppendUint32(dst, uint32(q.Block))
	dst = le.AppendUint32(dst, q.Count)
	dst = le.AppendUint32(dst, uint32(len(q.Sums)))
	dst = le.AppendUint32(dst, uint32(len(q.Entries)))
	for _, s := range q.Sums {
		dst = le.AppendUint32(dst, s)
	}
	dst = appendEntries(dst, q.Entries)
	for _, l := range q.Chain {
		dst = le.AppendUint32(dst, uint32(l))
	}
	putHeader(dst[start:], q.Kind, q.Flags&^FlagReply, q.ID, len(q.Data))
	return dst
}

// AppendReply appends the header and body of r to dst. The caller sends r.Data
// right after it.
func AppendReply(dst []byte, r *Reply) []byte {
	start := len(dst)
	detail := r.Detail
	if len(detail) > maxDetail {
		detail = detail[:maxDetail]
	}
	dst = append(dst, make([]byte, HeaderBytes)...)
	dst = le.AppendUint32(dst, uint32(r.Status))
	dst = le.AppendUint32(dst, uint32(r.Epoch))
	dst = le.AppendUint64(dst, uint64(r.Block))
	dst = le.AppendUint64(dst, r.Count64)
	dst = le.AppendUint64(dst, uint64(r.Version))
	dst = le.AppendUint64(dst, uint64(r.Floor))
	dst = le.AppendUint64(dst, uint64(r.Incarnation))
	dst = le.AppendUint64(dst, r.Took)
	dst = le.AppendUint32(dst, uint32(len(r.Digests)))
	dst = le.AppendUint32(dst, uint32(len(r.Entries)))
	dst = le.AppendUint64(dst, uint64(len(detail)))
	for _, d := range r.Digests {
		dst = le.AppendUint64(dst, d)
	}
	dst = appendEntries(dst, r.Entries)
	dst = append(dst, detail...)
	putHeader(dst[start:], r.Kind, r.Flags|FlagReply, r.ID, len(r.Data))
	return dst
}

func appendEntries(dst []byte, es []Entry) []byte {
	for i := range es {
		e := &es[i]
		dst = le.AppendUint64(dst, uint64(e.Chunk))
		dst = le.AppendUint64(dst, uint64(e.Version))
		dst = le.AppendUint32(dst, uint32(e.Layer))
		dst = le.AppendUint32(dst, uint32(e.Block))
		dst = le.AppendUint32(dst, e.Sum)
		dst = le.AppendUint32(dst, uint32(e.Kind))
	}
	return dst
}

func putHeader(frame []byte, k Kind, flags uint16, id uint64, data int) {
	body := frame[HeaderBytes:]
	le.PutUint32(frame[0:], magic)
	frame[4] = Version
	frame[5] = byte(k)
	le.PutUint16(frame[6:], flags)
	le.PutUint64(frame[8:], id)
	le.PutUint32(frame[16:], uint32(len(body)))
	le.PutUint32(frame[20:], uint32(data))
	le.PutUint32(frame[24:], Checksum(body))
	le.PutUint32(frame[28:], Checksum(frame[:28]))
}

// Header is a decoded frame header. Its lengths are within the limits.
type Header struct {
	Kind    Kind
	Flags   uint16
	ID      uint64
	BodyLen int
	DataLen int
	bodySum uint32
}

// ParseHeader checks and decodes the first HeaderBytes of b.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderBytes {
		return Header{}, io.ErrUnexpectedEOF
	}
	if le.Uint32(b) != magic {
		return Header{}, status.Errorf(status.Invalid, "not a cairn frame")
	}
	if le.Uint32(b[28:]) != Checksum(b[:28]) {
		return Header{}, status.Errorf(status.Corrupt, "frame header damaged on the way")
	}
	if b[4] != Version {
		return Header{}, status.Errorf(status.Unsupported, "frame of protocol version %d, this server speaks %d", b[4], Version)
	}
	h := Header{Kind: Kind(b[5]), Flags: le.Uint16(b[6:]), ID: le.Uint64(b[8:]), bodySum: le.Uint32(b[24:])}
	body, data := le.Uint32(b[16:]), le.Uint32(b[20:])
	if body > MaxBody || data > MaxData {
		return Header{}, status.Errorf(status.TooBig, "frame of %d + %d bytes is over the limit of %d + %d", body, data, MaxBody, MaxData)
	}
	h.BodyLen, h.DataLen = int(body), int(data)
	return h, nil
}

// DecodeRequest decodes a request's body. Data is read by the caller.
func DecodeRequest(h Header, body []byte) (*Request, error) {
	if h.Flags&FlagReply != 0 || h.Kind == 0 || h.Kind >= kindCount {
		return nil, status.Errorf(status.Unsupported, "frame kind %d is not a request", h.Kind)
	}
	if err := checkBody(h, body, requestFixed); err != nil {
		return nil, err
	}
	q := &Request{Kind: h.Kind, Flags: h.Flags, ID: h.ID}
	copy(q.Store[:], body)
	q.Volume = ids.VolumeID(le.Uint64(body[16:]))
	q.Chunk = ids.ChunkID(le.Uint64(body[24:]))
	q.Version = ids.Version(le.Uint64(body[32:]))
	q.Floor = ids.Version(le.Uint64(body[40:]))
	q.Limit = ids.Version(le.Uint64(body[48:]))
	q.Layer = ids.LayerID(le.Uint32(body[56:]))
	q.Epoch = ids.Epoch(le.Uint32(body[60:]))
	q.Block = ids.Block(le.Uint32(body[64:]))
	q.Count = le.Uint32(body[68:])
	sums, entries := uint64(le.Uint32(body[72:])), uint64(le.Uint32(body[76:]))
	rest := body[requestFixed:]
	fixed := 4*sums + entryBytes*entries
	if fixed > uint64(len(rest)) || (uint64(len(rest))-fixed)%4 != 0 || uint64(len(rest))-fixed > 4*(MaxLayers-1) {
		return nil, status.Errorf(status.Invalid, "request body of %d bytes does not hold %d sums, %d entries and a chain of at most %d layers", len(body), sums, entries, MaxLayers)
	}
	if sums > 0 {
		q.Sums = make([]uint32, sums)
		for i := range q.Sums {
			q.Sums[i] = le.Uint32(rest[4*i:])
		}
	}
	var err error
	if q.Entries, err = decodeEntries(rest[4*sums : fixed]); err != nil {
		return nil, err
	}
	for rest = rest[fixed:]; len(rest) > 0; rest = rest[4:] {
		q.Chain = append(q.Chain, ids.LayerID(le.Uint32(rest)))
	}
	return q, q.check(h.DataLen)
}

// check holds a request against its own counts, once, at the door.
func (q *Request) check(data int) error {
	bad := func(what string) error {
		return status.Errorf(status.Invalid, "%s request with %s", q.Kind, what)
	}
	if data%ids.BlockSize != 0 && q.Kind != Hello {
		return bad("a broken block")
	}
	if uint64(q.Block)+uint64(q.Count) > 1<<32 {
		return bad("blocks beyond any chunk")
	}
	if !q.Chained() {
		return bad("layers that do not descend")
	}
	switch q.Kind {
	case Write:
		if q.Count == 0 || q.Count > MaxIO || len(q.Sums) != int(q.Count) || data != int(q.Count)*ids.BlockSize {
			return bad("counts that do not match its data")
		}
	case Read:
		if q.Count == 0 || q.Count > MaxIO || data != 0 {
			return bad("a wrong count")
		}
	case Install:
		n := 0
		for i := range q.Entries {
			if q.Entries[i].Kind == EntryData {
				n++
			}
		}
		if data != n*ids.BlockSize {
			return bad("counts that do not match its data")
		}
	case Hello:
		if data > maxDetail {
			return bad("a long name")
		}
	default:
		if data != 0 {
			return bad("data it should not have")
		}
	}
	return nil
}

// Chained reports whether the chain is one: of a Read, each layer older than the
// one before.
func (q *Request) Chained() bool {
	last := q.Layer
	for _, l := range q.Chain {
		if l >= last {
			return false
		}
		last = l
	}
	return len(q.Chain) == 0 || q.Kind == Read && len(q.Chain) < MaxLayers
}

// DecodeReply decodes a reply's body. Data is read by the caller.
func DecodeReply(h Header, body []byte) (*Reply, error) {
	if h.Flags&FlagReply == 0 {
		return nil, status.Errorf(status.Invalid, "frame kind %d is not a reply", h.Kind)
	}
	if err := checkBody(h, body, replyFixed); err != nil {
		return nil, err
	}
	r := &Reply{Kind: h.Kind, Flags: h.Flags, ID: h.ID}
	r.Status = status.Kind(le.Uint32(body))
	r.Epoch = ids.Epoch(le.Uint32(body[4:]))
	r.Block = ids.Block(le.Uint64(body[8:]))
	r.Count64 = le.Uint64(body[16:])
	r.Version = ids.Version(le.Uint64(body[24:]))
	r.Floor = ids.Version(le.Uint64(body[32:]))
	r.Incarnation = ids.Incarnation(le.Uint64(body[40:]))
	r.Took = le.Uint64(body[48:])
	digests, entries, detail := uint64(le.Uint32(body[56:])), uint64(le.Uint32(body[60:])), le.Uint64(body[64:])
	rest := body[replyFixed:]
	if detail > maxDetail || 8*digests+entryBytes*entries+detail != uint64(len(rest)) {
		return nil, status.Errorf(status.Invalid, "reply body of %d bytes does not hold %d digests and %d entries", len(body), digests, entries)
	}
	if digests > 0 {
		r.Digests = make([]uint64, digests)
		for i := range r.Digests {
			r.Digests[i] = le.Uint64(rest[8*i:])
		}
	}
	rest = rest[8*digests:]
	var err error
	if r.Entries, err = decodeEntries(rest[:entryBytes*entries]); err != nil {
		return nil, err
	}
	r.Detail = string(rest[entryBytes*entries:])
	return r, nil
}

func checkBody(h Header, body []byte, fixed int) error {
	if len(body) != h.BodyLen || len(body) < fixed {
		return status.Errorf(status.Invalid, "frame body of %d bytes, want at least %d", len(body), fixed)
	}
	if Checksum(body) != h.bodySum {
		return status.Errorf(status.Corrupt, "frame body damaged on the way")
	}
	return nil
}

func decodeEntries(b []byte) ([]Entry, error) {
	if len(b) == 0 {
		return nil, nil
	}
	es := make([]Entry, len(b)/entryBytes)
	for i := range es {
		p := b[i*entryBytes:]
		es[i] = Entry{Chunk: ids.ChunkID(le.Uint64(p)), Version: ids.Version(le.Uint64(p[8:])),
			Layer: ids.LayerID(le.Uint32(p[16:])), Block: ids.Block(le.Uint32(p[20:])),
			Sum: le.Uint32(p[24:]), Kind: EntryKind(p[28])}
		if k := le.Uint32(p[28:]); k > 255 {
			return nil, status.Errorf(status.Invalid, "a block cannot be in state %d", k)
		}
	}
	return es, nil
}
