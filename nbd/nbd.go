// Package nbd is the NBD protocol without sockets: what the bytes of the fixed
// newstyle handshake and of the transmission phase mean, for both sides, and
// what a server answers to each option.
//
// Duty: constants, limits, encoders, bounds-checked decoders, the server's
// negotiation as a step function. Floor: F2. It reads and writes no
// connection and knows no volume: nbd/server and nbd/client do.
//
// Source: doc/proto.md of github.com/NetworkBlockDevice/nbd. Constants that
// go-nbd's pkg/protocol has are taken from there; the rest is spelled here.
package nbd

import "github.com/pojntfx/go-nbd/pkg/protocol"

// Limits. Every length from a peer is held against one of them before anything
// is allocated for it.
const (
	MaxName     = 4096      // bytes of an export name or a context query
	MaxOption   = 64 << 10  // bytes of one option's data
	MaxReply    = 64 << 10  // bytes of one option reply's data (client side)
	MaxQueries  = 256       // queries in one META_CONTEXT option
	MaxPayload  = 32 << 20  // bytes one READ or WRITE carries; advertised as the maximum block size
	MaxExtents  = 128 << 10 // descriptors a client takes in one BLOCK_STATUS reply
	MaxErrText  = 4096      // bytes of text in a structured error
	MinBlock    = 1         // advertised: any byte range
	PreferBlock = 4096      // advertised: a block of cairn
)

// Handshake flags.
const (
	FlagFixedNewstyle = protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE
	FlagNoZeroes      = uint16(1 << 1)
)

// Options.
const (
	OptExportName     = uint32(1)
	OptAbort          = protocol.NEGOTIATION_ID_OPTION_ABORT
	OptList           = protocol.NEGOTIATION_ID_OPTION_LIST
	OptStartTLS       = uint32(5)
	OptInfo           = protocol.NEGOTIATION_ID_OPTION_INFO
	OptGo             = protocol.NEGOTIATION_ID_OPTION_GO
	OptStructured     = uint32(8)
	OptListMeta       = uint32(9)
	OptSetMeta        = uint32(10)
	OptExtendedHdrs   = uint32(11)
	ContextAllocation = "base:allocation" // the metadata context served
	contextAllocID    = uint32(1)
	contextNamespace  = "base:"
)

// Option replies.
const (
	RepAck          = protocol.NEGOTIATION_TYPE_REPLY_ACK
	RepServer       = protocol.NEGOTIATION_TYPE_REPLY_SERVER
	RepInfo         = protocol.NEGOTIATION_TYPE_REPLY_INFO
	RepMetaContext  = uint32(4)
	RepErrUnsup     = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
	RepErrPolicy    = repError | 2
	RepErrInvalid   = repError | 3
	RepErrPlatform  = repError | 4
	RepErrTLSReqd   = repError | 5
	RepErrUnknown   = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN
	RepErrShutdown  = repError | 7
	RepErrBlockSize = repError | 8
	RepErrTooBig    = repError | 9

	repError = uint32(1 << 31)
)

// Kinds of information in an INFO reply.
const (
	InfoExport      = protocol.NEGOTIATION_TYPE_INFO_EXPORT
	InfoName        = protocol.NEGOTIATION_TYPE_INFO_NAME
	InfoDescription = protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION
	InfoBlockSize   = protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE
)

// Transmission flags of an export.
const (
	HasFlags        = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	ReadOnly        = uint16(1 << 1)
	SendFlush       = uint16(1 << 2)
	SendFUA         = uint16(1 << 3)
	Rotational      = uint16(1 << 4)
	SendTrim        = uint16(1 << 5)
	SendWriteZeroes = uint16(1 << 6)
	SendDF          = uint16(1 << 7)
	CanMultiConn    = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	SendResize      = uint16(1 << 9)
	SendCache       = uint16(1 << 10)
	SendFastZero    = uint16(1 << 11)
)

// Commands.
const (
	CmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ
	CmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	CmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	CmdFlush       = uint16(3)
	CmdTrim        = uint16(4)
	CmdCache       = uint16(5)
	CmdWriteZeroes = uint16(6)
	CmdBlockStatus = uint16(7)
)

// Command flags.
const (
	CmdFUA      = uint16(1 << 0)
	CmdNoHole   = uint16(1 << 1)
	CmdDF       = uint16(1 << 2)
	CmdReqOne   = uint16(1 << 3)
	CmdFastZero = uint16(1 << 4)
)

// Structured reply chunks.
const (
	ChunkDone = uint16(1 << 0) // flag: the last chunk of a reply

	TypeNone        = uint16(0)
	TypeOffsetData  = uint16(1)
	TypeOffsetHole  = uint16(2)
	TypeBlockStatus = uint16(5)
	TypeError       = typeErrorBit | 1
	TypeErrorOffset = typeErrorBit | 2

	typeErrorBit = uint16(1 << 15)
)

// States of base:allocation.
const (
	StateHole = uint32(1 << 0)
	StateZero = uint32(1 << 1)
)

const (
	magicOldstyle   = protocol.NEGOTIATION_MAGIC_OLDSTYLE
	magicOption     = protocol.NEGOTIATION_MAGIC_OPTION
	magicReply      = protocol.NEGOTIATION_MAGIC_REPLY
	magicRequest    = protocol.TRANSMISSION_MAGIC_REQUEST
	magicSimple     = protocol.TRANSMISSION_MAGIC_REPLY
	magicStructured = uint32(0x668e33ef)
)
