package nbd

import (
	"encoding/binary"

	"github.com/cairnstore/cairn/proto/status"
)

var be = binary.BigEndian

// Sizes of the fixed parts of the handshake, in bytes.
const (
	GreetingSize     = 18
	ClientFlagsSize  = 4
	OptionHeaderSize = 16
	ReplyHeaderSize  = 20
)

// AppendGreeting appends what a server says first:
//
//	0  u64 "NBDMAGIC"   8  u64 "IHAVEOPT"   16  u16 handshake flags
func AppendGreeting(b []byte, flags uint16) []byte {
	b = be.AppendUint64(b, magicOldstyle)
	b = be.AppendUint64(b, magicOption)
	return be.AppendUint16(b, flags)
}

// ParseGreeting reads a server's greeting of GreetingSize bytes.
func ParseGreeting(b []byte) (flags uint16, err error) {
	if len(b) < GreetingSize || be.Uint64(b) != magicOldstyle {
		return 0, status.Errorf(status.Invalid, "the peer is no NBD server: its greeting is not NBDMAGIC")
	}
	if be.Uint64(b[8:]) != magicOption {
		return 0, status.Errorf(status.Unsupported, "the NBD server speaks only the oldstyle handshake, which has no export names; use a newer server")
	}
	return be.Uint16(b[16:]), nil
}

// AppendOption appends a client's option:
//
//	0  u64 "IHAVEOPT"   8  u32 option   12  u32 length   16  data
func AppendOption(b []byte, id uint32, data []byte) []byte {
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint32(b, id)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// ParseOptionHeader reads an option's header. The length is checked: at most
// MaxOption bytes of data follow, else the error is status.TooBig.
func ParseOptionHeader(b []byte) (id, length uint32, err error) {
	if len(b) < OptionHeaderSize || be.Uint64(b) != magicOption {
		return 0, 0, status.Errorf(status.Invalid, "an option does not begin with IHAVEOPT")
	}
	id, length = be.Uint32(b[8:]), be.Uint32(b[12:])
	if length > MaxOption {
		return id, 0, status.Errorf(status.TooBig, "option %d has %d bytes of data, more than %d", id, length, MaxOption)
	}
	return id, length, nil
}

// AppendReply appends a server's answer to an option:
//
//	0  u64 0x3e889045565a9   8  u32 option   12  u32 reply   16  u32 length   20  data
func AppendReply(b []byte, option, reply uint32, data []byte) []byte {
	b = be.AppendUint64(b, magicReply)
	b = be.AppendUint32(b, option)
	b = be.AppendUint32(b, reply)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// ParseReplyHeader reads the header of an answer to option want; at most
// MaxReply bytes of data follow.
func ParseReplyHeader(b []byte, want uint32) (reply, length uint32, err error) {
	if len(b) < ReplyHeaderSize || be.Uint64(b) != magicReply {
		return 0, 0, status.Errorf(status.Invalid, "the server's answer to option %d has no reply magic", want)
	}
	option := be.Uint32(b[8:])
	reply, length = be.Uint32(b[12:]), be.Uint32(b[16:])
	if option != want {
		return 0, 0, status.Errorf(status.Invalid, "the server answered option %d when asked option %d", option, want)
	}
	if length > MaxReply {
		return 0, 0, status.Errorf(status.TooBig, "the server's answer to option %d has %d bytes, more than %d", want, length, MaxReply)
	}
	return reply, length, nil
}

// ReplyError turns an error reply of a server into an error; nil if reply is
// none.
func ReplyError(option, reply uint32, text []byte) error {
	if reply&repError == 0 {
		return nil
	}
	kind, why := status.Invalid, "an error of an unknown sort"
	switch reply {
	case RepErrUnsup:
		kind, why = status.Unsupported, "it does not speak this option"
	case RepErrPolicy:
		kind, why = status.Permission, "its policy forbids it"
	case RepErrInvalid:
		why = "it calls the option malformed"
	case RepErrPlatform:
		kind, why = status.Unsupported, "its platform cannot"
	case RepErrTLSReqd:
		kind, why = status.Permission, "it demands TLS; give a TLS configuration"
	case RepErrUnknown:
		kind, why = status.NotFound, "it has no such export"
	case RepErrShutdown:
		kind, why = status.Shutdown, "it is shutting down"
	case RepErrBlockSize:
		kind, why = status.Unsupported, "it demands that block sizes be negotiated"
	case RepErrTooBig:
		kind, why = status.TooBig, "it calls the request too big"
	}
	if len(text) > 0 {
		return status.Errorf(kind, "the NBD server refused option %d: %s (%q)", option, why, text)
	}
	return status.Errorf(kind, "the NBD server refused option %d: %s", option, why)
}

// AppendInfoRequest appends the data of INFO and GO:
//
//	u32 name length, name, u16 count, count × u16 information wanted
func AppendInfoRequest(b []byte, name string, infos ...uint16) []byte {
	b = appendString(b, name)
	b = be.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = be.AppendUint16(b, i)
	}
	return b
}

func parseInfoRequest(b []byte) (name string, infos []uint16, err error) {
	name, b, err = cutString(b)
	if err != nil {
		return "", nil, err
	}
	if len(b) < 2 || len(b)-2 != 2*int(be.Uint16(b)) {
		return "", nil, status.Errorf(status.Invalid, "the list of wanted information does not fill the option")
	}
	for b = b[2:]; len(b) > 0; b = b[2:] {
		infos = append(infos, be.Uint16(b))
	}
	return name, infos, nil
}

// AppendMetaRequest appends the data of LIST_META_CONTEXT and
// SET_META_CONTEXT:
//
//	u32 name length, name, u32 count, count × (u32 length, query)
func AppendMetaRequest(b []byte, name string, queries ...string) []byte {
	b = appendString(b, name)
	b = be.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = appendString(b, q)
	}
	return b
}

func parseMetaRequest(b []byte) (name string, queries []string, err error) {
	name, b, err = cutString(b)
	if err != nil {
		return "", nil, err
	}
	if len(b) < 4 {
		return "", nil, status.Errorf(status.Invalid, "the number of queries is missing")
	}
	count := be.Uint32(b)
	if count > MaxQueries {
		return "", nil, status.Errorf(status.TooBig, "%d context queries are more than %d", count, MaxQueries)
	}
	b = b[4:]
	for range count {
		var q string
		if q, b, err = cutString(b); err != nil {
			return "", nil, err
		}
		queries = append(queries, q)
	}
	if len(b) != 0 {
		return "", nil, status.Errorf(status.Invalid, "%d bytes follow the last query", len(b))
	}
	return name, queries, nil
}

// ParseMetaContext reads one context that a server selected or listed.
func ParseMetaContext(b []byte) (id uint32, name string, err error) {
	if len(b) < 4 {
		return 0, "", status.Errorf(status.Invalid, "a metadata context of %d bytes has no id", len(b))
	}
	return be.Uint32(b), string(b[4:]), nil
}

// ParseListed reads one export of a LIST answer; the text after the name is a
// description.
func ParseListed(b []byte) (name string, err error) {
	name, _, err = cutString(b)
	return name, err
}

func appendString(b []byte, s string) []byte {
	return append(be.AppendUint32(b, uint32(len(s))), s...)
}

// cutString takes a string with its length off the front of b.
func cutString(b []byte) (string, []byte, error) {
	if len(b) < 4 {
		return "", nil, status.Errorf(status.Invalid, "the length of a name is missing")
	}
	n := be.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return "", nil, status.Errorf(status.Invalid, "a name of %d bytes is longer than its option", n)
	}
	if n > MaxName {
		return "", nil, status.Errorf(status.TooBig, "a name of %d bytes is longer than %d", n, MaxName)
	}
	return string(b[4 : 4+n]), b[4+n:], nil
}
