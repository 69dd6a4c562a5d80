/* C ABI of the HTTP edge: hyper and tokio on one thread of their own. Built with the cargo feature `http`.
 *
 * Functions that can fail return a torpor_text_status and write one sentence to `error`, as in torpor_text_shim.h, whose rules
 * on pointers hold here too. Nothing unwinds out of these functions.
 *
 * An exchange is one request and its answer: either respond once, or begin, write any number of times, and end. One thread at
 * a time may use an exchange; different ones are independent. It may outlive the server, and its client is gone then.
 */
#ifndef TORPOR_HTTP_SHIM_H
#define TORPOR_HTTP_SHIM_H

#include "torpor_text_shim.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct torpor_http_server torpor_http_server;
typedef struct torpor_http_exchange torpor_http_exchange;

typedef struct {
  const char* data;
  size_t size;
} torpor_http_view; /* text that belongs to whoever passes it; NULL when empty */

typedef struct {
  torpor_http_view name, value;
} torpor_http_header;

typedef struct {
  torpor_http_view host;        /* address or name; NULL: no TCP */
  uint16_t port;                /* 0: any that is free */
  torpor_http_view socket;      /* path of a UNIX socket, made with mode 0600; NULL: none */
  size_t max_body_bytes;        /* of one request */
  size_t max_bodies_bytes;      /* of all requests whose answers are not complete */
  size_t max_head_bytes;        /* request line and headers, at least 8192; a longer head gets 431 */
  size_t max_connections;       /* one more gets 503 */
  uint64_t head_timeout_ms;     /* from a head's first byte to its end */
  uint64_t body_timeout_ms;     /* from a head's end to its body's */
  uint64_t idle_timeout_ms;     /* without a request, and without a byte sent or received */
  size_t stream_buffer_bytes;   /* of one stream that may wait for its reader; a write beyond it waits */
  uint64_t stall_timeout_ms;    /* a write that waits longer cuts the connection */
} torpor_http_config;

typedef struct {
  uint64_t id;                  /* never used twice by a server */
  torpor_http_view method, path, query, peer; /* as in src/server/http.h */
  const torpor_http_header* headers;
  size_t headers_size;
  torpor_http_view body;
  uint16_t refused;             /* 0; or the status to answer with: 408, 413 or 503, and the body is empty */
} torpor_http_request;

/* Called on the server's thread; they must return at once. */
typedef struct {
  void* context;                /* valid until torpor_http_stop returns */
  /* `exchange` is the callee's, to free when it has been answered. `request` is valid during the call. */
  void (*request)(void* context, const torpor_http_request* request, torpor_http_exchange* exchange);
  /* The client of exchange `id` went before it had the whole answer. At most once each, after `request`; perhaps while the
   * exchange is being freed. */
  void (*gone)(void* context, uint64_t id);
} torpor_http_callbacks;

/* Binds, and serves on a thread of its own. INVALID when an address can't be bound. */
torpor_text_status torpor_http_start(const torpor_http_config* config, const torpor_http_callbacks* callbacks,
                                     torpor_http_server** out, torpor_text_bytes* error);
/* The TCP port that was bound; 0 without TCP. */
uint16_t torpor_http_port(const torpor_http_server* server);
/* Connections that are open. */
size_t torpor_http_connections(const torpor_http_server* server);
/* Closes the listeners and all idle connections. Answers under way go on; their connections close after them. */
void torpor_http_drain(const torpor_http_server* server);
/* Waits for the last connection to close; false when `timeout_ms` have passed first. */
bool torpor_http_wait(const torpor_http_server* server, uint64_t timeout_ms);
/* Cuts what is open, ends the thread and frees the server. Not from a callback. In a forked child it does nothing. */
void torpor_http_stop(torpor_http_server* server);

/* INVALID when a header can't be sent: nothing has been said then. */
torpor_text_status torpor_http_respond(torpor_http_exchange* exchange, uint16_t status, const torpor_http_header* headers,
                                       size_t headers_size, const char* body, size_t body_size, torpor_text_bytes* error);
torpor_text_status torpor_http_begin(torpor_http_exchange* exchange, uint16_t status, const torpor_http_header* headers,
                                     size_t headers_size, torpor_text_bytes* error);
/* Waits while the reader is slow. False: the client has gone. */
bool torpor_http_write(torpor_http_exchange* exchange, const char* data, size_t size);
/* From now on `data` is sent whenever nothing was for `idle_ms`. */
void torpor_http_keep_alive(torpor_http_exchange* exchange, const char* data, size_t size, uint64_t idle_ms);
void torpor_http_end(torpor_http_exchange* exchange);
/* Cuts the connection of an answer that is not complete. */
void torpor_http_exchange_free(torpor_http_exchange* exchange);

/* Writes 32 bytes. For keys, which hold more than 128 bits of chance; no hash for passwords. */
void torpor_http_sha256(const char* data, size_t size, uint8_t* out);

#ifdef __cplusplus
}
#endif

#endif
