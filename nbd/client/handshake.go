package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/proto/status"
)

// URI is a parsed NBD URI. Source: doc/uri.md beside the protocol document.
type URI struct {
	Network string // "tcp" or "unix"
	Addr    string // host:port or path
	Export  string
	TLS     bool
	Host    string // to verify a certificate against; "" for unix sockets
}

// ParseURI reads nbd://host[:port]/name, nbd+unix:///name?socket=/path, and
// the same with nbds for TLS.
func ParseURI(uri string) (URI, error) {
	bad := func(why string) (URI, error) {
		return URI{}, status.Errorf(status.Invalid, "%q is no NBD URI: %s (nbd://host:port/name or nbd+unix:///name?socket=/path)", uri, why)
	}
	u, err := url.Parse(uri)
	if err != nil {
		return bad(err.Error())
	}
	out := URI{Export: strings.TrimPrefix(u.Path, "/")}
	if len(out.Export) > nbd.MaxName {
		return bad("the export's name is too long")
	}
	scheme, unix := strings.CutSuffix(u.Scheme, "+unix")
	switch scheme {
	case "nbd":
	case "nbds":
		out.TLS = true
	default:
		return bad("the scheme is " + u.Scheme)
	}
	if unix {
		out.Network, out.Addr = "unix", u.Query().Get("socket")
		if out.Addr == "" || u.Host != "" {
			return bad("a unix socket needs ?socket= and no host")
		}
		return out, nil
	}
	out.Network, out.Host = "tcp", u.Hostname()
	if out.Host == "" {
		out.Host = "localhost"
	}
	port := u.Port()
	if port == "" {
		port = "10809"
	}
	out.Addr = net.JoinHostPort(out.Host, port)
	return out, nil
}

// handshake is the client's side of a negotiation under way.
type handshake struct {
	nc    net.Conn
	name  string
	flags uint16 // of the server
	kept  bool   // the connection is given away
	c     *Client
}

// dial connects, secures, and lets then do the rest. The client is usable if
// then opened the export; otherwise the connection is closed.
func dial(ctx context.Context, u URI, tlsConf *tls.Config, then func(*handshake) error) (*Client, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, u.Network, u.Addr)
	if err != nil {
		return nil, status.Errorf(status.Unavailable, "cannot connect to the NBD server at %s: %w", u.Addr, err)
	}
	woken := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { woken <- nc.SetDeadline(time.Unix(1, 0)) })
	h := &handshake{nc: nc, name: u.Export, c: &Client{}}
	err = h.run(ctx, u, tlsConf, then)
	if !stop() {
		err = errors.Join(err, ctx.Err(), <-woken)
	}
	if err == nil && h.kept {
		return nil, nil
	}
	if err == nil && h.c.export.Flags != 0 {
		h.c.nc, h.c.br = h.nc, bufio.NewReaderSize(h.nc, 64<<10)
		if err = h.c.start(); err == nil {
			return h.c, nil
		}
	}
	if cerr := h.nc.Close(); cerr != nil && err == nil {
		err = cerr
	}
	if err != nil && ctx.Err() != nil {
		err = status.Errorf(status.Timeout, "the NBD handshake with %s was cut short: %w", u.Addr, errors.Join(ctx.Err(), err))
	}
	return nil, err
}

// run does what every handshake begins with, then the rest.
func (h *handshake) run(ctx context.Context, u URI, tlsConf *tls.Config, then func(*handshake) error) error {
	var b [nbd.GreetingSize]byte
	if _, err := io.ReadFull(h.nc, b[:]); err != nil {
		return status.Errorf(status.Unavailable, "the server at %s did not greet: %w", u.Addr, err)
	}
	flags, err := nbd.ParseGreeting(b[:])
	if err != nil {
		return err
	}
	h.flags = flags & (nbd.FlagFixedNewstyle | nbd.FlagNoZeroes)
	if _, err := h.nc.Write([]byte{0, 0, byte(h.flags >> 8), byte(h.flags)}); err != nil {
		return err
	}
	if tlsConf != nil || u.TLS {
		if err := h.secure(ctx, u, tlsConf); err != nil {
			return err
		}
	}
	return then(h)
}

func (h *handshake) secure(ctx context.Context, u URI, conf *tls.Config) error {
	if h.flags&nbd.FlagFixedNewstyle == 0 {
		return status.Errorf(status.Unsupported, "the NBD server is too old for TLS")
	}
	if err := h.ask(nbd.OptStartTLS, nil, nil); err != nil {
		return err
	}
	if conf == nil {
		conf = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if conf.ServerName == "" && !conf.InsecureSkipVerify {
		conf = conf.Clone()
		conf.ServerName = u.Host
	}
	tc := tls.Client(h.nc, conf)
	if err := tc.HandshakeContext(ctx); err != nil {
		return status.Errorf(status.Permission, "TLS with the NBD server at %s failed: %w", u.Addr, err)
	}
	h.nc = tc
	return nil
}

// ask sends an option and takes the replies up to the final one; each gets
// those before it.
func (h *handshake) ask(id uint32, data []byte, each func(reply uint32, data []byte) error) error {
	if _, err := h.nc.Write(nbd.AppendOption(nil, id, data)); err != nil {
		return err
	}
	for {
		var head [nbd.ReplyHeaderSize]byte
		if _, err := io.ReadFull(h.nc, head[:]); err != nil {
			return status.Errorf(status.Unavailable, "the NBD server hung up at option %d: %w", id, err)
		}
		reply, n, err := nbd.ParseReplyHeader(head[:], id)
		if err != nil {
			return err
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(h.nc, data); err != nil {
			return err
		}
		if err := nbd.ReplyError(id, reply, data); err != nil {
			return err
		}
		if reply == nbd.RepAck {
			return nil
		}
		if each == nil {
			continue
		}
		if err := each(reply, data); err != nil {
			return err
		}
	}
}

// tolerant is ask for an option a server need not speak.
func (h *handshake) tolerant(id uint32, data []byte, each func(uint32, []byte) error) (bool, error) {
	err := h.ask(id, data, each)
	if k := status.Of(err); k == status.Unsupported {
		return false, nil
	}
	return err == nil, err
}

// open goes into transmission with as much as the server speaks.
func (h *handshake) open() (err error) {
	c := h.c
	c.export.Name = h.name
	if h.flags&nbd.FlagFixedNewstyle == 0 {
		return h.exportName()
	}
	if c.structured, err = h.tolerant(nbd.OptStructured, nil, nil); err != nil {
		return err
	}
	if c.structured {
		if err := h.contexts(); err != nil {
			return err
		}
	}
	return h.plain()
}

// plain opens the export without negotiating anything for transmission.
func (h *handshake) plain() error {
	h.c.export.Name = h.name
	if h.flags&nbd.FlagFixedNewstyle == 0 {
		return h.exportName()
	}
	data := nbd.AppendInfoRequest(nil, h.name, nbd.InfoBlockSize)
	ok, err := h.tolerant(nbd.OptGo, data, h.readInfo)
	if err != nil {
		return err
	}
	if !ok {
		return h.exportName()
	}
	if h.c.export.Flags&nbd.HasFlags == 0 {
		return status.Errorf(status.Invalid, "the NBD server opened export %q without describing it", h.name)
	}
	return nil
}

func (h *handshake) readInfo(reply uint32, data []byte) error {
	if reply != nbd.RepInfo {
		return nil
	}
	return h.c.export.ReadInfo(data)
}

func (h *handshake) contexts() error {
	data := nbd.AppendMetaRequest(nil, h.name, nbd.ContextAllocation)
	_, err := h.tolerant(nbd.OptSetMeta, data, func(reply uint32, data []byte) error {
		if reply != nbd.RepMetaContext {
			return nil
		}
		id, name, err := nbd.ParseMetaContext(data)
		if err == nil && name == nbd.ContextAllocation {
			h.c.describes, h.c.allocID = true, id
		}
		return err
	})
	return err
}

func (h *handshake) exportName() error {
	if _, err := h.nc.Write(nbd.AppendOption(nil, nbd.OptExportName, []byte(h.name))); err != nil {
		return err
	}
	size := nbd.OldExportSize
	if h.flags&nbd.FlagNoZeroes == 0 {
		size += 124
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(h.nc, b); err != nil {
		return status.Errorf(status.NotFound, "the NBD server hung up: it may have no export %q: %w", h.name, err)
	}
	h.c.export.ReadOld(b)
	h.c.export.Flags |= nbd.HasFlags
	return nil
}

func (h *handshake) list() ([]string, error) {
	var names []string
	err := h.ask(nbd.OptList, nil, func(reply uint32, data []byte) error {
		if reply != nbd.RepServer {
			return nil
		}
		name, err := nbd.ParseListed(data)
		names = append(names, name)
		return err
	})
	if err != nil {
		return nil, err
	}
	return names, h.abort()
}

func (h *handshake) info() (nbd.Export, error) {
	err := h.ask(nbd.OptInfo, nbd.AppendInfoRequest(nil, h.name, nbd.InfoName, nbd.InfoDescription, nbd.InfoBlockSize), h.readInfo)
	if err != nil {
		return nbd.Export{}, err
	}
	x := h.c.export
	h.c.export = nbd.Export{} // not opened
	if x.Name == "" {
		x.Name = h.name
	}
	return x, h.abort()
}

// abort ends a negotiation politely. A server may hang up without an answer.
func (h *handshake) abort() error {
	err := h.ask(nbd.OptAbort, nil, nil)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}
