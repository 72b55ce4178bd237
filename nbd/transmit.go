package nbd

import (
	"github.com/cairnstore/cairn/proto/status"
)

// Sizes of the fixed parts of transmission, in bytes.
const (
	RequestSize     = 28
	SimpleSize      = 16
	StructuredSize  = 20
	DataHeadSize    = StructuredSize + 8 // header and offset of a chunk of data
	ExtentSize      = 8
	StatusHeadSize  = StructuredSize + 4 // header and context id of a chunk of extents
	errorPrefixSize = 6
)

// Request is a command without its payload.
type Request struct {
	Flags  uint16
	Type   uint16
	Cookie uint64
	Off    uint64
	Len    uint32
}

// AppendRequest appends a request's header:
//
//	0  u32 0x25609513   4  u16 flags   6  u16 type   8  u64 cookie   16  u64 offset   24  u32 length
func AppendRequest(b []byte, r Request) []byte {
	b = be.AppendUint32(b, magicRequest)
	b = be.AppendUint16(b, r.Flags)
	b = be.AppendUint16(b, r.Type)
	b = be.AppendUint64(b, r.Cookie)
	b = be.AppendUint64(b, r.Off)
	return be.AppendUint32(b, r.Len)
}

// ParseRequest reads a header of RequestSize bytes; false means that the peer
// is out of step and the connection cannot be used any more.
func ParseRequest(b []byte) (Request, bool) {
	_ = b[RequestSize-1]
	if be.Uint32(b) != magicRequest {
		return Request{}, false
	}
	return Request{Flags: be.Uint16(b[4:]), Type: be.Uint16(b[6:]), Cookie: be.Uint64(b[8:]), Off: be.Uint64(b[16:]), Len: be.Uint32(b[24:])}, true
}

// allowedFlags are the flags each command may carry. FUA is allowed with every
// command, as the protocol demands, and means something for those that write.
var allowedFlags = [...]uint16{
	CmdRead:        CmdFUA | CmdDF,
	CmdWrite:       CmdFUA,
	CmdDisc:        CmdFUA,
	CmdFlush:       CmdFUA,
	CmdTrim:        CmdFUA,
	CmdCache:       CmdFUA,
	CmdWriteZeroes: CmdFUA | CmdNoHole | CmdFastZero,
	CmdBlockStatus: CmdFUA | CmdReqOne,
}

// Door is what a connection's requests are held against.
type Door struct {
	Size       uint64
	ReadOnly   bool
	Structured bool
	AllocID    uint32
}

// Check validates a request once: what it lets through is inside the export,
// inside the limits, and spoken by this connection. It returns status.OK or
// the kind to answer with. Whether a write's payload must be read off the
// connection does not depend on it.
func (d *Door) Check(r Request) status.Kind {
	if int(r.Type) >= len(allowedFlags) || r.Flags&^allowedFlags[r.Type] != 0 || (r.Flags&CmdDF != 0 && !d.Structured) {
		return status.Invalid
	}
	writes := false
	switch r.Type {
	case CmdFlush, CmdDisc:
		return status.OK
	case CmdWrite, CmdWriteZeroes, CmdTrim:
		writes = true
	case CmdBlockStatus:
		if d.AllocID == 0 {
			return status.Invalid
		}
	}
	switch {
	case writes && d.ReadOnly:
		return status.Permission
	case r.Len == 0:
		return status.Invalid
	case (r.Type == CmdRead || r.Type == CmdWrite) && r.Len > MaxPayload:
		return status.Invalid
	case r.Off > d.Size || uint64(r.Len) > d.Size-r.Off:
		if r.Type == CmdWrite || r.Type == CmdWriteZeroes {
			return status.NoSpace
		}
		return status.Invalid
	case r.Flags&CmdFastZero != 0 && r.Flags&CmdNoHole != 0:
		return status.Unsupported // provisioning writes every byte: not fast
	}
	return status.OK
}

// AppendSimple appends a simple reply's header; a read's data follows it:
//
//	0  u32 0x67446698   4  u32 error   8  u64 cookie
func AppendSimple(b []byte, cookie uint64, errno uint32) []byte {
	b = be.AppendUint32(b, magicSimple)
	b = be.AppendUint32(b, errno)
	return be.AppendUint64(b, cookie)
}

// appendChunk appends a structured chunk's header:
//
//	0  u32 0x668e33ef   4  u16 flags   6  u16 type   8  u64 cookie   16  u32 length   20  payload
func appendChunk(b []byte, flags, kind uint16, cookie uint64, length uint32) []byte {
	b = be.AppendUint32(b, magicStructured)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, kind)
	b = be.AppendUint64(b, cookie)
	return be.AppendUint32(b, length)
}

// AppendDataHead appends what goes before n bytes of data that are a read's
// whole answer.
func AppendDataHead(b []byte, cookie, off uint64, n uint32) []byte {
	b = appendChunk(b, ChunkDone, TypeOffsetData, cookie, 8+n)
	return be.AppendUint64(b, off)
}

// AppendError appends a structured error, with a text for people.
func AppendError(b []byte, cookie uint64, errno uint32, text string) []byte {
	text = text[:min(len(text), MaxErrText)]
	b = appendChunk(b, ChunkDone, TypeError, cookie, errorPrefixSize+uint32(len(text)))
	b = be.AppendUint32(b, errno)
	b = be.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}

// Extent is a run of bytes in one state of base:allocation.
type Extent struct {
	Len   uint32
	State uint32
}

// AppendStatusHead appends what goes before count extents that are a block
// status's whole answer.
func AppendStatusHead(b []byte, cookie uint64, context uint32, count int) []byte {
	b = appendChunk(b, ChunkDone, TypeBlockStatus, cookie, 4+uint32(count)*ExtentSize)
	return be.AppendUint32(b, context)
}

// AppendExtent appends one extent.
func AppendExtent(b []byte, x Extent) []byte {
	return be.AppendUint32(be.AppendUint32(b, x.Len), x.State)
}

// Chunk is the header of a reply as a client reads it: a simple reply, or one
// chunk of a structured one.
type Chunk struct {
	Structured bool
	Done       bool
	Type       uint16
	Errno      uint32 // of a simple reply
	Cookie     uint64
	Len        uint32 // of the payload; 0 for a simple reply, whose data the client knows
}

// IsError says that the chunk reports a failure.
func (c Chunk) IsError() bool { return c.Type&typeErrorBit != 0 || c.Errno != 0 }

// ReplyHead says how many bytes the header beginning with the 4 bytes of b
// has.
func ReplyHead(b []byte) (int, error) {
	switch be.Uint32(b) {
	case magicSimple:
		return SimpleSize, nil
	case magicStructured:
		return StructuredSize, nil
	}
	return 0, status.Errorf(status.Invalid, "the server is out of step: %#08x is no reply", be.Uint32(b))
}

// ParseChunk reads a header whose size ReplyHead gave.
func ParseChunk(b []byte) (Chunk, error) {
	if len(b) == SimpleSize {
		return Chunk{Done: true, Errno: be.Uint32(b[4:]), Cookie: be.Uint64(b[8:])}, nil
	}
	c := Chunk{Structured: true, Done: be.Uint16(b[4:])&ChunkDone != 0, Type: be.Uint16(b[6:]), Cookie: be.Uint64(b[8:]), Len: be.Uint32(b[16:])}
	limit := uint32(MaxErrText + 64)
	switch c.Type {
	case TypeNone:
		limit = 0
	case TypeOffsetData:
		limit = 8 + MaxPayload
	case TypeOffsetHole:
		limit = 12
	case TypeBlockStatus:
		limit = 4 + MaxExtents*ExtentSize
	}
	if c.Len > limit {
		return c, status.Errorf(status.Invalid, "the server sent a chunk of type %d with %d bytes, more than %d", c.Type, c.Len, limit)
	}
	return c, nil
}

// ParseError reads the payload of an error chunk.
func ParseError(b []byte) (errno uint32, text string, err error) {
	if len(b) < errorPrefixSize || len(b)-errorPrefixSize < int(be.Uint16(b[4:])) {
		return 0, "", status.Errorf(status.Invalid, "the server sent an error chunk of %d bytes, which is cut off", len(b))
	}
	errno = be.Uint32(b)
	if errno == 0 {
		return 0, "", status.Errorf(status.Invalid, "the server sent an error chunk without an error")
	}
	return errno, string(b[errorPrefixSize : errorPrefixSize+int(be.Uint16(b[4:]))]), nil
}

// ParseHole reads the payload of a hole chunk.
func ParseHole(b []byte) (off uint64, n uint32, err error) {
	if len(b) != 12 {
		return 0, 0, status.Errorf(status.Invalid, "the server sent a hole of %d bytes, not 12", len(b))
	}
	return be.Uint64(b), be.Uint32(b[8:]), nil
}

// ParseOffset reads the offset before a data chunk's bytes.
func ParseOffset(b []byte) uint64 { return be.Uint64(b) }

// ParseExtents reads the payload of a block status chunk.
func ParseExtents(b []byte) (context uint32, xs []Extent, err error) {
	if len(b) < 4+ExtentSize || (len(b)-4)%ExtentSize != 0 {
		return 0, nil, status.Errorf(status.Invalid, "the server sent a block status of %d bytes", len(b))
	}
	context = be.Uint32(b)
	for b = b[4:]; len(b) > 0; b = b[ExtentSize:] {
		xs = append(xs, Extent{Len: be.Uint32(b), State: be.Uint32(b[4:])})
	}
	return context, xs, nil
}

// KindOf returns the kind of an error number on the NBD wire.
func KindOf(errno uint32) status.Kind {
	switch errno {
	case 0:
		return status.OK
	case 1:
		return status.Permission
	case 5:
		return status.IO
	case 12, 75: // ENOMEM, EOVERFLOW
		return status.TooBig
	case 28:
		return status.NoSpace
	case 95:
		return status.Unsupported
	case 108:
		return status.Shutdown
	}
	return status.Invalid // EINVAL, and whatever the protocol does not know
}
