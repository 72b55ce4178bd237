package nbd

import (
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// Export is what a client learns about an export.
type Export struct {
	Name        string
	Description string
	Size        uint64
	Flags       uint16
	MinBlock    uint32 // 0 from a server that does not say
	PreferBlock uint32
	MaxBlock    uint32
}

// Next is what follows an option.
type Next uint8

// What can follow.
const (
	NextOption   Next = iota // send the reply, read the next option
	NextTLS                  // send the reply, then shake hands over TLS and forget everything negotiated
	NextTransmit             // send the reply, then serve Negotiation.Chosen
	NextClose                // send the reply, then close
)

// TLSRule says how a connection stands with TLS.
type TLSRule uint8

// The rules.
const (
	TLSNone     TLSRule = iota // not configured: STARTTLS is refused
	TLSOffered                 // allowed
	TLSRequired                // nothing but STARTTLS and ABORT before it
	TLSActive                  // this connection is inside TLS
)

// Negotiation is the server's side of one handshake as a step function: Option
// takes what the client asks and gives what to answer.
type Negotiation struct {
	TLS    TLSRule
	List   func() []string
	Lookup func(name string) (Export, error) // error kinds: NotFound, Permission, Shutdown, ...

	NoZeroes   bool   // agreed in the client flags
	Structured bool   // agreed: READ and BLOCK_STATUS are answered in chunks
	Chosen     Export // set with NextTransmit
	AllocID    uint32 // context id of base:allocation in transmission; 0: not selected

	metaExport string // the export SET_META_CONTEXT was for
	metaID     uint32
}

// ClientFlags takes the four bytes that follow the greeting.
func (n *Negotiation) ClientFlags(b []byte) error {
	if len(b) < ClientFlagsSize {
		return status.Errorf(status.Invalid, "the client's flags are cut off")
	}
	flags := be.Uint32(b)
	if flags&^uint32(FlagFixedNewstyle|FlagNoZeroes) != 0 {
		return status.Errorf(status.Unsupported, "the client set unknown handshake flags %#x", flags)
	}
	n.NoZeroes = flags&uint32(FlagNoZeroes) != 0
	if flags&uint32(FlagFixedNewstyle) == 0 { // such a client cannot know of TLS
		if n.TLS == TLSRequired {
			return status.Errorf(status.Permission, "the client is too old for TLS, which this server demands")
		}
		n.TLS = TLSNone
	}
	return nil
}

// Option answers one option: bytes to send are appended to out.
func (n *Negotiation) Option(id uint32, data, out []byte) ([]byte, Next) {
	if n.TLS == TLSRequired && id != OptStartTLS && id != OptAbort {
		if id == OptExportName { // has no error reply
			return out, NextClose
		}
		return refuse(out, id, RepErrTLSReqd, "this server demands TLS: start it first"), NextOption
	}
	switch id {
	case OptExportName:
		return n.exportName(data, out)
	case OptAbort:
		return AppendReply(out, id, RepAck, nil), NextClose
	case OptList:
		return n.list(data, out), NextOption
	case OptStartTLS:
		return n.startTLS(data, out)
	case OptInfo, OptGo:
		return n.info(id, data, out)
	case OptStructured:
		if len(data) != 0 {
			return refuse(out, id, RepErrInvalid, "this option has no data"), NextOption
		}
		n.Structured = true
		return AppendReply(out, id, RepAck, nil), NextOption
	case OptListMeta, OptSetMeta:
		return n.meta(id, data, out), NextOption
	default:
		return AppendReply(out, id, RepErrUnsup, nil), NextOption
	}
}

// exportName is the old way into transmission: no reply header, no errors.
//
//	0  u64 size   8  u16 flags   10  124 zero bytes, unless NO_ZEROES
func (n *Negotiation) exportName(data, out []byte) ([]byte, Next) {
	if len(data) > MaxName {
		return out, NextClose
	}
	x, err := n.Lookup(string(data))
	if err != nil {
		return out, NextClose
	}
	n.choose(x)
	out = be.AppendUint64(out, n.Chosen.Size)
	out = be.AppendUint16(out, n.Chosen.Flags)
	if !n.NoZeroes {
		out = append(out, make([]byte, 124)...)
	}
	return out, NextTransmit
}

// choose settles the export: DF means something only in structured replies,
// and a context selected for another export is void.
func (n *Negotiation) choose(x Export) {
	n.Chosen = n.visible(x)
	n.AllocID = 0
	if n.Structured && n.metaExport == x.Name {
		n.AllocID = n.metaID
	}
}

func (n *Negotiation) visible(x Export) Export {
	if n.Structured {
		x.Flags |= SendDF
	}
	return x
}

func (n *Negotiation) list(data, out []byte) []byte {
	if len(data) != 0 {
		return refuse(out, OptList, RepErrInvalid, "this option has no data")
	}
	for _, name := range n.List() {
		out = AppendReply(out, OptList, RepServer, appendString(nil, name))
	}
	return AppendReply(out, OptList, RepAck, nil)
}

func (n *Negotiation) startTLS(data, out []byte) ([]byte, Next) {
	switch {
	case len(data) != 0:
		return refuse(out, OptStartTLS, RepErrInvalid, "this option has no data"), NextOption
	case n.TLS == TLSActive:
		return refuse(out, OptStartTLS, RepErrInvalid, "TLS is already on"), NextOption
	case n.TLS == TLSNone:
		return refuse(out, OptStartTLS, RepErrPolicy, "this server has no certificate"), NextOption
	}
	return AppendReply(out, OptStartTLS, RepAck, nil), NextTLS
}

// Secured returns the state after a TLS handshake: nothing that was said in
// clear counts, but for the client's flags, which are not repeated.
func (n *Negotiation) Secured() *Negotiation {
	return &Negotiation{TLS: TLSActive, List: n.List, Lookup: n.Lookup, NoZeroes: n.NoZeroes}
}

func (n *Negotiation) info(id uint32, data, out []byte) ([]byte, Next) {
	name, infos, err := parseInfoRequest(data)
	if err != nil {
		return refuseErr(out, id, err), NextOption
	}
	x, err := n.Lookup(name)
	if err != nil {
		return refuseErr(out, id, err), NextOption
	}
	v := n.visible(x)
	b := be.AppendUint16(nil, InfoExport)
	b = be.AppendUint64(b, v.Size)
	b = be.AppendUint16(b, v.Flags)
	out = AppendReply(out, id, RepInfo, b)
	for _, want := range infos {
		switch want {
		case InfoName:
			out = AppendReply(out, id, RepInfo, append(be.AppendUint16(nil, InfoName), v.Name...))
		case InfoDescription:
			if v.Description != "" {
				out = AppendReply(out, id, RepInfo, append(be.AppendUint16(nil, InfoDescription), v.Description...))
			}
		}
	}
	// Sent even when not asked for: a client that knows it keeps to the maximum.
	b = be.AppendUint16(nil, InfoBlockSize)
	b = be.AppendUint32(b, MinBlock)
	b = be.AppendUint32(b, PreferBlock)
	b = be.AppendUint32(b, MaxPayload)
	out = AppendReply(out, id, RepInfo, b)
	out = AppendReply(out, id, RepAck, nil)
	if id == OptInfo {
		return out, NextOption
	}
	n.choose(x)
	return out, NextTransmit
}

// meta lists or selects metadata contexts. A SET forgets the one before, also
// when it fails.
func (n *Negotiation) meta(id uint32, data, out []byte) []byte {
	if id == OptSetMeta {
		n.metaExport, n.metaID = "", 0
	}
	name, queries, err := parseMetaRequest(data)
	if err != nil {
		return refuseErr(out, id, err)
	}
	if !n.Structured {
		return refuse(out, id, RepErrInvalid, "metadata contexts need structured replies: negotiate them first")
	}
	x, err := n.Lookup(name)
	if err != nil {
		return refuseErr(out, id, err)
	}
	match := id == OptListMeta && len(queries) == 0
	for _, q := range queries {
		if q == ContextAllocation || (id == OptListMeta && q == contextNamespace) {
			match = true
		}
	}
	if match {
		ctx := uint32(0) // a listing carries no id
		if id == OptSetMeta {
			ctx = contextAllocID
			n.metaExport, n.metaID = x.Name, ctx // the default export is known by its own name, too
		}
		out = AppendReply(out, id, RepMetaContext, append(be.AppendUint32(nil, ctx), ContextAllocation...))
	}
	return AppendReply(out, id, RepAck, nil)
}

func refuse(out []byte, id, reply uint32, text string) []byte {
	return AppendReply(out, id, reply, []byte(text))
}

// refuseErr answers an option with the reply that fits an error's kind.
func refuseErr(out []byte, id uint32, err error) []byte {
	reply := RepErrInvalid
	switch status.Of(err) {
	case status.NotFound:
		reply = RepErrUnknown
	case status.Permission, status.Held, status.Fenced:
		reply = RepErrPolicy
	case status.Shutdown, status.Unavailable, status.Timeout:
		reply = RepErrShutdown
	case status.TooBig:
		reply = RepErrTooBig
	case status.Invalid:
	default:
		reply = RepErrPlatform
	}
	text := err.Error()
	if len(text) > MaxErrText {
		text = strings.ToValidUTF8(text[:MaxErrText], "")
	}
	return refuse(out, id, reply, text)
}

// ReadInfo enters one INFO reply into x. Unknown sorts of information are
// skipped, as the protocol demands.
func (x *Export) ReadInfo(b []byte) error {
	if len(b) < 2 {
		return status.Errorf(status.Invalid, "an information reply of %d bytes has no type", len(b))
	}
	kind, b := be.Uint16(b), b[2:]
	switch {
	case kind == InfoExport && len(b) == 10:
		x.Size, x.Flags = be.Uint64(b), be.Uint16(b[8:])
	case kind == InfoName:
		x.Name = string(b)
	case kind == InfoDescription:
		x.Description = string(b)
	case kind == InfoBlockSize && len(b) == 12:
		x.MinBlock, x.PreferBlock, x.MaxBlock = be.Uint32(b), be.Uint32(b[4:]), be.Uint32(b[8:])
	case kind == InfoExport || kind == InfoBlockSize:
		return status.Errorf(status.Invalid, "information of type %d has %d bytes", kind, len(b))
	}
	return nil
}

// ReadOld enters the answer to EXPORT_NAME, without its zeroes, into x.
func (x *Export) ReadOld(b []byte) {
	x.Size, x.Flags = be.Uint64(b), be.Uint16(b[8:])
}

// OldExportSize is the size of the answer to EXPORT_NAME without its 124 zeroes.
const OldExportSize = 10
