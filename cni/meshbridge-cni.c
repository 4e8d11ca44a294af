// SPDX-License-Identifier: Apache-2.0
/*
 * meshbridge-cni - the last plugin of a node's CNI chain: hands each call to the agent and prints its answer.
 *
 * Nothing is decided here. It is a static program without an interpreter, since it runs on the host and not in an
 * image. All memory is in fixed buffers, all waiting ends, and whatever goes wrong fails ADD, so that no pod starts
 * without the agent's programs; DEL succeeds without an agent, so that every pod can be deleted.
 *
 * What is sent: "MBCNI1\n", then for CNI_COMMAND, CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_ARGS, CNI_PATH and the
 * standard input in this order a length (32 bits, little endian) and as many bytes. What comes back: a 32-bit
 * status, 0 or the exit code to end with, a length, and as many bytes for the standard output.
 *
 * Spec: CNI 1.1.0, sections 2 (execution protocol) and 5 (errors, versions).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_SOCKET "/run/meshbridge/cni.sock"
#define MAX_INPUT (1 << 20)
#define MAX_ANSWER (1 << 20)
#define MAX_VARIABLE 4096
#define ADD_MS 60000
#define DEL_MS 10000
#define INPUT_MS 10000

enum error_code { /* of the CNI specification */
                  ERR_VARIABLE = 4,
                  ERR_IO = 5,
                  ERR_DECODE = 6,
                  ERR_CONFIG = 7,
                  ERR_TRY_LATER = 11,
                  ERR_NOT_AVAILABLE = 50,
};

static const char *const VARIABLES[] = {"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS",
                                        "CNI_IFNAME",  "CNI_ARGS",        "CNI_PATH"};
#define VARIABLE_COUNT (sizeof(VARIABLES) / sizeof(VARIABLES[0]))

static char input[MAX_INPUT + 1];
static char answer[MAX_ANSWER];
static char version[17] = "1.0.0"; /* of the configuration, for errors; only digits and dots */
static const char *command = "";

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int write_all(const char *data, size_t size)
{
	while (size > 0) {
		ssize_t done = write(STDOUT_FILENO, data, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return -1;
		data += done;
		size -= (size_t)done;
	}
	return 0;
}

/*
 * fail - end with a CNI error; for DEL without one, as a pod without network has to go too.
 * @what: constant text; the further arguments are ours as well, so nothing in it needs escaping.
 */
static void __attribute__((noreturn, format(printf, 2, 3))) fail(enum error_code code, const char *what, ...)
{
	char message[512], text[768];
	va_list arguments;
	int size;

	if (strcmp(command, "DEL") == 0)
		exit(0);
	va_start(arguments, what);
	vsnprintf(message, sizeof(message), what, arguments);
	va_end(arguments);
	size = snprintf(text, sizeof(text), "{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"meshbridge-cni: %s\"}\n",
	                version, code, message);
	if (size > 0)
		write_all(text, (size_t)size < sizeof(text) ? (size_t)size : sizeof(text) - 1);
	exit(1);
}

/* wait_for - Return: 0 once @fd is ready for @events, -1 at @deadline or on a fault. */
static int wait_for(int fd, short events, int64_t deadline)
{
	for (;;) {
		struct pollfd waited = {.fd = fd, .events = events};
		int64_t left = deadline - now_ms();
		int found;

		if (left <= 0)
			return -1;
		found = poll(&waited, 1, (int)left);
		if (found > 0)
			return 0;
		if (found < 0 && errno != EINTR)
			return -1;
	}
}

static size_t read_input(void)
{
	int64_t deadline = now_ms() + INPUT_MS;
	size_t size = 0;

	for (;;) {
		ssize_t got;

		if (wait_for(STDIN_FILENO, POLLIN, deadline) < 0)
			fail(ERR_IO, "no end of the standard input within %d s", INPUT_MS / 1000);
		got = read(STDIN_FILENO, input + size, sizeof(input) - size);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			fail(ERR_IO, "cannot read the standard input: %s", strerror(errno));
		if (got == 0)
			return size;
		size += (size_t)got;
		if (size > MAX_INPUT)
			fail(ERR_DECODE, "more than %d bytes of configuration", MAX_INPUT);
	}
}

/*
 * find_string - the value of a string member of the outermost object.
 * @value: takes it, zero-terminated, if it is shorter than @size and has nothing escaped.
 *
 * Scans without recursion: strings are passed over whole, so that no brace or quote in one counts.
 *
 * Return: 1 if there is one, 0 if there is none, -1 if it is there and no such string.
 */
static int find_string(const char *text, size_t length, const char *key, char *value, size_t size)
{
	size_t depth = 0, at = 0, key_length = strlen(key);

	while (at < length) {
		char c = text[at];
		size_t start, end;

		if (c == '{' || c == '[')
			depth++;
		if ((c == '}' || c == ']') && depth > 0)
			depth--;
		if (c != '"') {
			at++;
			continue;
		}
		start = ++at;
		while (at < length && text[at] != '"')
			at += text[at] == '\\' ? 2 : 1;
		if (at >= length)
			return 0;
		end = at++;
		if (depth != 1 || end - start != key_length || memcmp(text + start, key, key_length) != 0)
			continue;
		while (at < length && strchr(" \t\r\n", text[at]) && text[at] != '\0')
			at++;
		if (at >= length || text[at] != ':')
			continue; /* a value that reads like the key */
		at++;
		while (at < length && strchr(" \t\r\n", text[at]) && text[at] != '\0')
			at++;
		if (at >= length || text[at] != '"')
			return -1;
		start = ++at;
		while (at < length && text[at] != '"') {
			if (text[at] == '\\' || (unsigned char)text[at] < 0x20)
				return -1;
			at++;
		}
		if (at >= length || at - start >= size)
			return -1;
		memcpy(value, text + start, at - start);
		value[at - start] = '\0';
		return 1;
	}
	return 0;
}

/* is_path - whether @path is absolute, and may be told in an error without escapes. */
static int is_path(const char *path)
{
	const char *at;

	for (at = path; *at != '\0'; at++)
		if (*at <= ' ' || *at > '~' || *at == '"' || *at == '\\')
			return 0;
	return path[0] == '/';
}

static void take_version(size_t length)
{
	char found[sizeof(version)];

	if (find_string(input, length, "cniVersion", found, sizeof(found)) == 1 && found[0] != '\0' &&
	    strspn(found, "0123456789.") == strlen(found))
		memcpy(version, found, sizeof(version));
}

static void __attribute__((noreturn)) print_versions(void)
{
	static const char text[] = "{\"cniVersion\":\"1.1.0\",\"supportedVersions\":"
				   "[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n";

	exit(write_all(text, sizeof(text) - 1) == 0 ? 0 : 1);
}

/* connect_agent - a connection to the agent at @path, which has to be root's: its answers decide what pods start. */
static int connect_agent(const char *path, int64_t deadline)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct ucred peer = {.uid = (uid_t)-1};
	socklen_t size = sizeof(peer);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	enum error_code away = strcmp(command, "STATUS") == 0 ? ERR_NOT_AVAILABLE : ERR_TRY_LATER;

	if (fd < 0)
		fail(ERR_IO, "cannot make a socket: %s", strerror(errno));
	memcpy(address.sun_path, path, strlen(path)); /* shorter, see main */
	while (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN || now_ms() >= deadline) /* EAGAIN: its queue is full */
			fail(away,
			     "the agent of this node does not answer (%s: %s); is its pod "
			     "running?",
			     path, strerror(errno));
		poll(NULL, 0, 50);
	}
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || (peer.uid != 0 && peer.uid != geteuid()))
		fail(ERR_IO, "whoever listens at %s is not root", path);
	return fd;
}

static void send_all(int fd, const char *data, size_t size, int64_t deadline)
{
	while (size > 0) {
		ssize_t done = send(fd, data, size, MSG_NOSIGNAL);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0 && errno == EAGAIN) {
			if (wait_for(fd, POLLOUT, deadline) < 0)
				fail(ERR_TRY_LATER, "the agent of this node does not read what it is asked");
			continue;
		}
		if (done < 0)
			fail(ERR_TRY_LATER, "the agent of this node hung up: %s", strerror(errno));
		data += done;
		size -= (size_t)done;
	}
}

static void send_part(int fd, const char *data, size_t size, int64_t deadline)
{
	unsigned char header[4] = {size & 0xff, size >> 8 & 0xff, size >> 16 & 0xff, size >> 24 & 0xff};

	send_all(fd, (const char *)header, sizeof(header), deadline);
	send_all(fd, data, size, deadline);
}

static void receive(int fd, char *data, size_t size, int64_t deadline)
{
	while (size > 0) {
		ssize_t got = recv(fd, data, size, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && errno == EAGAIN) {
			if (wait_for(fd, POLLIN, deadline) < 0)
				fail(ERR_TRY_LATER, "the agent of this node did not answer in time; see its log");
			continue;
		}
		if (got <= 0)
			fail(ERR_TRY_LATER, "the agent of this node ended before it answered");
		data += got;
		size -= (size_t)got;
	}
}

static uint32_t number(const unsigned char *bytes)
{
	return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

int main(void)
{
	const char *values[VARIABLE_COUNT];
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)] = DEFAULT_SOCKET;
	unsigned char header[8];
	size_t length, index;
	uint32_t status, size;
	int64_t deadline;
	int fd;

	signal(SIGPIPE, SIG_IGN);
	for (index = 0; index < VARIABLE_COUNT; index++) {
		const char *value = getenv(VARIABLES[index]);

		values[index] = value ? value : "";
	}
	command = values[0];
	for (index = 0; index < VARIABLE_COUNT; index++)
		if (strlen(values[index]) > MAX_VARIABLE)
			fail(ERR_VARIABLE, "%s has more than %d bytes", VARIABLES[index], MAX_VARIABLE);
	if (strcmp(command, "VERSION") == 0)
		print_versions();
	if (strcmp(command, "ADD") != 0 && strcmp(command, "DEL") != 0 && strcmp(command, "CHECK") != 0 &&
	    strcmp(command, "GC") != 0 && strcmp(command, "STATUS") != 0)
		fail(ERR_VARIABLE, "CNI_COMMAND is not one of ADD, CHECK, DEL, GC, STATUS and VERSION");
	length = read_input();
	take_version(length);
	if (find_string(input, length, "socket", path, sizeof(path)) < 0 || !is_path(path))
		fail(ERR_CONFIG, "'socket' in the configuration is no path of at most %zu bytes", sizeof(path) - 1);
	deadline = now_ms() + (strcmp(command, "DEL") == 0 ? DEL_MS : ADD_MS);
	fd = connect_agent(path, deadline);
	send_all(fd, "MBCNI1\n", 7, deadline);
	for (index = 0; index < VARIABLE_COUNT; index++)
		send_part(fd, values[index], strlen(values[index]), deadline);
	send_part(fd, input, length, deadline);
	receive(fd, (char *)header, sizeof(header), deadline);
	status = number(header);
	size = number(header + 4);
	if (size > MAX_ANSWER)
		fail(ERR_DECODE, "the agent of this node answers with more than %d bytes", MAX_ANSWER);
	receive(fd, answer, size, deadline);
	if (write_all(answer, size) < 0)
		return 1;
	return status == 0 ? 0 : 1;
}
