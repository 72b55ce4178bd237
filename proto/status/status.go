// Package status is the closed set of error kinds that cross a wire, and what
// each is for an operating system, an NBD client and a gRPC caller.
//
// Duty: kinds, errors that carry one, and the mappings. Floor: F0. It does not
// decide what to do about an error: retrying and excluding belong to the
// engine and the clients.
package status

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
)

// Kind is what sort of failure an error is. Its number is on the wire and
// never changes meaning.
type Kind uint16

// The kinds. New ones are added at the end.
const (
	OK          Kind = 0
	Invalid     Kind = 1  // the request itself is wrong; asking again is useless
	NotFound    Kind = 2  // no such volume, store, chunk, host or VM
	Exists      Kind = 3  // the name or id is taken
	Held        Kind = 4  // somebody else holds the volume
	Fenced      Kind = 5  // the epoch is over: another writer has been admitted
	Conflict    Kind = 6  // compare-and-set failed: read again and decide anew
	NoSpace     Kind = 7  // no room in the store, pool or quota
	IO          Kind = 8  // the disk failed
	Corrupt     Kind = 9  // a checksum or a structure is wrong; nothing was returned
	Poison      Kind = 10 // no good copy of this block is left until it is overwritten
	Unavailable Kind = 11 // not now: no quorum, no leader, peer down; nothing happened
	Unknown     Kind = 12 // the outcome is unknown; safe to ask again with the same key
	Shutdown    Kind = 13 // the server is going away
	Permission  Kind = 14 // read-only, or not yours
	Unsupported Kind = 15 // not spoken here: other version or feature
	Expired     Kind = 16 // the client session is gone; its commands are never re-applied
	TooBig      Kind = 17 // over a stated limit
	Internal    Kind = 18 // a broken invariant of our own
	Timeout     Kind = 19 // no answer in time
	kindCount   Kind = 20
)

var names = [kindCount]string{"ok", "invalid", "not found", "exists", "held", "fenced", "conflict",
	"no space", "i/o error", "corrupt", "poison", "unavailable", "unknown outcome", "shutting down",
	"permission denied", "unsupported", "session expired", "too big", "internal error", "timeout"}

// String returns the kind in words.
func (k Kind) String() string {
	if k < kindCount {
		return names[k]
	}
	return fmt.Sprintf("kind %d", uint16(k))
}

// Error makes a bare Kind usable as an error and as a target of errors.Is.
func (k Kind) Error() string { return k.String() }

// Error is an error with a kind that survives the wire. Its text is one
// sentence for a person: what, why, what to do.
type Error struct {
	Kind Kind
	Text string
	Err  error // the cause, if it is in this process; may be nil
}

// Error returns the sentence.
func (e *Error) Error() string {
	if e.Text == "" {
		return e.Kind.String()
	}
	return e.Text
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is the kind of e.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// Errorf returns an error of kind k. A %w in format is kept as the cause.
func Errorf(k Kind, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: k, Text: err.Error(), Err: errors.Unwrap(err)}
}

// Of returns the kind of err: OK for nil, Internal for an error nobody gave a
// kind.
func Of(err error) Kind {
	if err == nil {
		return OK
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return NoSpace
	case errors.Is(err, syscall.EIO):
		return IO
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return Timeout
	case errors.Is(err, context.Canceled):
		return Shutdown
	}
	if s, ok := gstatus.FromError(err); ok {
		return fromGRPC(s.Code())
	}
	return Internal
}

// NBD returns the error number of the NBD protocol for k (0 for OK).
// Source: the NBD protocol document, "Error values".
func NBD(k Kind) uint32 {
	switch k {
	case OK:
		return 0
	case Permission, Held, Fenced: // fenced: this client may not write here any more
		return uint32(syscall.EPERM)
	case Invalid, TooBig:
		return uint32(syscall.EINVAL)
	case NoSpace:
		return uint32(syscall.ENOSPC)
	case Unsupported:
		return uint32(syscall.ENOTSUP)
	case Shutdown:
		return uint32(syscall.ESHUTDOWN)
	default:
		return uint32(syscall.EIO)
	}
}

// Errno returns the error number an operating system would give for k.
func Errno(k Kind) syscall.Errno {
	switch k {
	case NotFound:
		return syscall.ENOENT
	case Exists:
		return syscall.EEXIST
	case Held, Conflict:
		return syscall.EBUSY
	case Unavailable, Unknown:
		return syscall.EAGAIN
	case Timeout:
		return syscall.ETIMEDOUT
	default:
		return syscall.Errno(NBD(k))
	}
}

var toCode = [kindCount]codes.Code{
	OK: codes.OK, Invalid: codes.InvalidArgument, NotFound: codes.NotFound, Exists: codes.AlreadyExists,
	Held: codes.FailedPrecondition, Fenced: codes.Aborted, Conflict: codes.Aborted, NoSpace: codes.ResourceExhausted,
	IO: codes.DataLoss, Corrupt: codes.DataLoss, Poison: codes.DataLoss, Unavailable: codes.Unavailable,
	Unknown: codes.Unknown, Shutdown: codes.Unavailable, Permission: codes.PermissionDenied,
	Unsupported: codes.Unimplemented, Expired: codes.FailedPrecondition, TooBig: codes.OutOfRange,
	Internal: codes.Internal, Timeout: codes.DeadlineExceeded,
}

// Code returns the gRPC code nearest to k. Replies carry the exact kind in a
// field of their own; the code is for generic tools.
func Code(k Kind) codes.Code {
	if k < kindCount {
		return toCode[k]
	}
	return codes.Internal
}

func fromGRPC(c codes.Code) Kind {
	switch c {
	case codes.OK:
		return OK
	case codes.InvalidArgument:
		return Invalid
	case codes.NotFound:
		return NotFound
	case codes.AlreadyExists:
		return Exists
	case codes.FailedPrecondition:
		return Held
	case codes.Aborted:
		return Conflict
	case codes.ResourceExhausted:
		return NoSpace
	case codes.DataLoss:
		return IO
	case codes.Unavailable:
		return Unavailable
	case codes.PermissionDenied, codes.Unauthenticated:
		return Permission
	case codes.Unimplemented:
		return Unsupported
	case codes.OutOfRange:
		return TooBig
	case codes.DeadlineExceeded:
		return Timeout
	case codes.Canceled:
		return Shutdown
	case codes.Unknown:
		return Unknown
	default:
		return Internal
	}
}

// New returns an error of kind k that says text; nil for OK. It is how a
// status that came over a wire becomes an error again.
func New(k Kind, text string) error {
	if k == OK {
		return nil
	}
	return &Error{Kind: k, Text: text}
}
